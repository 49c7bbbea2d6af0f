"""Adapters written for small transformers: PEFT loads them and gives the dense model's logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from small_models import bert, llama, logits

from orthomerge.adapters import (
    dora_left_factor,
    dora_magnitudes,
    lora_config,
    lora_tensors,
    padded_factors,
    saved_key,
    saved_modules,
)
from orthomerge.adapters.sources import open_source
from orthomerge.errors import AdapterError

TARGETS = {
    "llama": ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
    "bert": ("query", "value", "intermediate.dense", "layer.0.output.dense"),
}


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}


def targets(name: str, model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(TARGETS[name])
    ]


def loaded(folder: Path, model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


FORMS = dict.fromkeys(MODELS, ("lora", "padded", "dora", "saved"))
FORMS["bert"] += ("bias",)  # Llama has none to add to


@pytest.mark.parametrize(("name", "form"), [(n, f) for n, forms in FORMS.items() for f in forms])
def test_logits_are_those_of_the_dense_weights(tmp_path: Path, name: str, form: str) -> None:
    dense = MODELS[name]()
    weights = dense.state_dict()
    before = logits(dense)
    paths = targets(name, dense)
    assert len(paths) >= 6
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for place, path in enumerate(paths):
        W = weights[f"{path}.weight"]
        rank = 1 + place % 3
        B, A = torch.randn(len(W), rank).double(), 0.2 * torch.randn(rank, W.shape[1]).double()
        extra: dict[str, torch.Tensor] = {}
        wanted = W + B @ A
        if form == "dora":
            D = 0.5 + torch.rand(len(W), dtype=torch.float64)
            wanted = D[:, None] * W + B @ A
            extra["magnitude"] = dora_magnitudes(D, W, B, A)
            B = dora_left_factor(D, B)
        if form == "bias":
            extra["bias"] = torch.randn(len(W), dtype=torch.float64)
            weights[f"{path}.bias"] += extra["bias"]
        if form == "padded":
            B, A = padded_factors(B, A, 4)
        W.copy_(wanted)
        ranks[path] = B.shape[1]
        tensors |= lora_tensors(path, B, A, **extra)
    whole = {"llama": ["lm_head.weight", "model.norm.weight"], "bert": ["classifier.bias"]}[name]
    if name == "bert":  # PEFT always expects the head of a classifier
        whole += ["classifier.weight"]
    if form == "saved" or name == "bert":
        for key in whole:
            weights[key].add_(torch.randn_like(weights[key]))
            tensors[saved_key(key, ranks)] = weights[key].clone()
    modules = [path for path, _ in dense.named_modules()]
    saved = saved_modules(whole, ranks, modules) if form == "saved" or name == "bert" else ()
    config = lora_config(
        ranks,
        task_type=TASKS[name],
        base_modules=modules,
        dora=form == "dora",
        lora_bias=form == "bias",
        modules_to_save=saved,
    )
    write(tmp_path, tensors, config)
    after = logits(dense)
    assert float((after - before).abs().max()) > 1e-2
    theirs = loaded(tmp_path, MODELS[name]())
    torch.testing.assert_close(logits(theirs), after, atol=1e-12, rtol=0)
    if form == "padded":
        assert config["rank_pattern"] == {}
    ours = open_source(tmp_path).lora
    assert ours is not None
    assert set(ours.modules) == set(paths)


def test_trained_biases_are_loaded(tmp_path: Path) -> None:
    dense = bert()
    weights = dense.state_dict()
    paths = targets("bert", dense)
    names = [f"{paths[0]}.bias", "bert.pooler.dense.bias"]
    tensors = {}
    for path in paths:
        B, A = torch.ones(len(weights[f"{path}.weight"]), 1).double(), torch.ones(1, 1).double()
        tensors |= lora_tensors(path, B, A.expand(1, weights[f"{path}.weight"].shape[1]))
        weights[f"{path}.weight"].add_(1)
    for key in names:
        weights[key].add_(torch.randn_like(weights[key]))
        tensors[saved_key(key, paths)] = weights[key].clone()
    assert saved_modules(names, paths) == []
    write(tmp_path, tensors, lora_config(dict.fromkeys(paths, 1), bias="all"))
    torch.testing.assert_close(logits(loaded(tmp_path, bert())), logits(dense), atol=1e-12, rtol=0)
    ours = open_source(tmp_path).lora
    assert ours is not None
    assert set(ours.others) == set(names)


def test_combinations_that_peft_lacks_are_refused() -> None:
    B, A, v = torch.ones(3, 1), torch.ones(1, 2), torch.ones(3)
    with pytest.raises(AdapterError, match="no biases of B beside magnitudes"):
        lora_tensors("q", B, A, magnitude=v, bias=v)
    with pytest.raises(AdapterError, match="none for embeddings"):
        lora_tensors("q", B, A, kind="embedding", bias=torch.ones(2))
    with pytest.raises(AdapterError, match="no biases of B"):
        lora_config({"q": 1}, dora=True, lora_bias=True)
    for what in ("magnitude", "bias"):
        with pytest.raises(AdapterError, match=f"not one {what} per output feature") as caught:
            lora_tensors("q", B, A, **{what: torch.ones(2)})
        assert caught.value.tensor == "q"
    with pytest.raises(AdapterError, match="cannot be padded to rank 1"):
        padded_factors(torch.ones(3, 2), torch.ones(2, 2), 1)
    with pytest.raises(ValueError, match="lora_bias=True"):  # PEFT's own word for it
        peft.LoraConfig(use_dora=True, lora_bias=True)


def test_saved_modules_that_peft_would_mistake_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"further module.*pre_head"):
        saved_modules(["head.weight"], (), ["head", "pre_head"])
    with pytest.raises(AdapterError, match="further module"):
        saved_modules(["q.weight"], {"q"})
    assert saved_modules(["a.head.weight"], {"a.q"}, ["a.head", "a.q", "a"]) == ["a.head"]
