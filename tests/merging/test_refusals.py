"""Mistakes that would give a wrong model quietly: each is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orthomerge import merge, plan
from orthomerge.errors import AdapterError, NumericalError, OrthoMergeError, ResumeError
from orthomerge.merging import engine
from orthomerge.merging.executors import EXECUTORS, Interrupted

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


def base_folder(path: Path, *, tied: bool = False, **more: torch.Tensor) -> Path:
    path.mkdir()
    tensors = {f"model.layers.{i}.q.weight": torch.randn(4, 4) for i in range(3)}
    tensors["model.embed_tokens.weight"] = torch.randn(6, 4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, **more}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return path


def lora_folder(path: Path, modules: list[str], columns: int = 4, **whole: torch.Tensor) -> Path:
    path.mkdir()
    tensors = {f"base_model.model.{name}": tensor for name, tensor in whole.items()}
    for module in modules:
        rows = 6 if module == "lm_head" else 4
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(LORA))
    return path


def test_an_adapter_of_a_tied_head_is_refused(tmp_path) -> None:
    base = base_folder(tmp_path / "base", tied=True)
    lora = lora_folder(tmp_path / "lora", ["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head\.weight.*one"):
        plan([lora], base=base, method="task-arithmetic")
    untied = base_folder(tmp_path / "untied")
    assert merge([lora], base=untied, method="task-arithmetic").tensors


def test_a_saved_embedding_of_a_tied_base_is_refused(tmp_path) -> None:
    base = base_folder(tmp_path / "base", tied=True)
    whole = {"model.embed_tokens.weight": torch.randn(6, 4)}
    lora = lora_folder(tmp_path / "lora", ["model.layers.0.q"], **whole)
    with pytest.raises(AdapterError, match="embed_tokens"):
        plan([lora], base=base, method="task-arithmetic")


def test_updates_that_cancel_have_no_norm_matched_strength(tmp_path) -> None:
    base = {"w": torch.randn(8, 8)}
    model = {"w": base["w"] + torch.randn(8, 8)}
    settings = {"base": base, "method": "task-arithmetic", "weights": [1.0, -1.0]}
    with pytest.raises(NumericalError, match="norm-matched"):
        merge([model, model], norm_matched=1.0, **settings)


def test_a_changed_adapter_config_is_not_resumed(tmp_path, monkeypatch) -> None:
    base = base_folder(tmp_path / "base")
    lora = lora_folder(tmp_path / "lora", [f"model.layers.{i}.q" for i in range(3)])
    done = []
    original = EXECUTORS["merge"]

    def stop_after_one(task, context):
        if done:
            raise Interrupted
        done.append(task.name)
        return original(task, context)

    settings = {"base": base, "method": "task-arithmetic", "output": tmp_path / "out"}
    settings["run_settings"] = {"workers": 1}
    monkeypatch.setitem(EXECUTORS, "merge", stop_after_one)
    with pytest.raises((Interrupted, engine.Interrupted)):
        merge([lora], **settings)
    monkeypatch.setitem(EXECUTORS, "merge", original)
    (lora / "adapter_config.json").write_text(json.dumps({**LORA, "lora_alpha": 400}))
    with pytest.raises(ResumeError):
        merge([lora], resume=True, **settings)


def test_integer_buffers_do_not_stand_in_the_way_of_adapters(tmp_path) -> None:
    positions = {"model.layers.0.pos": torch.arange(4)}
    base = base_folder(tmp_path / "base", **positions)
    full = base_folder(tmp_path / "full", **positions)
    lora = lora_folder(tmp_path / "lora", ["model.layers.0.q"])
    found = merge([full, lora], base=base, method="task-arithmetic").tensors
    assert torch.equal(found["model.layers.0.pos"], torch.arange(4))


def test_reproduce_knows_no_blocks() -> None:
    base, model = {"w.weight": torch.randn(8, 8)}, {"w.weight": torch.randn(8, 8)}
    with pytest.raises(OrthoMergeError, match="reproduce"):
        plan([model], base=base, method="orthomerge", mode="reproduce", block=4)


def test_provenance_is_json_without_infinities(tmp_path) -> None:
    base, model = {"w.weight": torch.randn(8, 8)}, {"w.weight": torch.randn(8, 8)}
    out = tmp_path / "out"
    merge([model], base=base, method="orthomerge", mode="faithful", output=out)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads((out / "orthomerge.json").read_text(), parse_constant=refuse)
    assert record["parameters"]["c_max"] == "inf"
    assert record["parameters"]["anchor"] == 1e-6
