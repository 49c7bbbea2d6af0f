"""Merges of LoRA adapters that are refused: exit code, words, and nothing left behind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
MERGE = ("merge", "a", "b", "-m", "task-arithmetic", "-o", "out", "-q")


def write(folder, *, rows=6, columns=4, rank=2, changed=None, magnitude=False, **config):
    generator = torch.Generator().manual_seed(rows)
    tensors = {
        f"{PREFIX}layer.q.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{PREFIX}layer.q.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }
    if magnitude:
        tensors[f"{PREFIX}layer.q.lora_magnitude_vector"] = torch.ones(rows)
    for key, value in (changed or {}).items():
        tensors[f"{PREFIX}layer.q.{key}"].view(-1)[0] = value
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["q"],
        "use_dora": magnitude,
        **config,
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(content))


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    """Two adapters and their base in the working folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    write(tmp_path / "b", rank=3)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"layer.q.weight": torch.ones(6, 4)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    return tmp_path


def assert_refused(run, folder, arguments, code, *words) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found, out, err = run(*arguments)
    assert found == code, err
    assert not out
    assert "bug" not in err
    for word in words:
        assert word in " ".join(err.split()), err
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before, "something was left behind"
    assert {path.name for path in folder.iterdir()} == {
        p.relative_to(folder).parts[0] for p in before
    }


def test_the_adapters_themselves_can_be_merged(adapters, run) -> None:
    assert run(*MERGE)[0] == 0
    assert (adapters / "out" / "adapter_config.json").exists()


BROKEN = {
    "rows": ({"rows": 7}, 3, ["layer.q", "different shapes", "[6, 4] in a", "[7, 4] in b"]),
    "columns": ({"columns": 5}, 3, ["layer.q", "different shapes"]),
    "base": (
        {"base_model_name_or_path": "org/other"},
        3,
        ["different base models", "org/base (a), org/other (b)", "--assume-same-base"],
    ),
    "orientation": ({"fan_in_fan_out": True}, 3, ["fan_in_fan_out differ"]),
    "dora": ({"magnitude": True}, 3, ["layer.q", "DoRA", "--base"]),
    "pissa": ({"init_lora_weights": "pissa"}, 3, ["'pissa' changed the base's weights"]),
    "pissa-fast": ({"init_lora_weights": "pissa_niter_4"}, 3, ["'pissa_niter_4' changed"]),
    "olora": ({"init_lora_weights": "olora"}, 3, ["'olora' changed", "path_initial_model"]),
    "nan": (
        {"changed": {"lora_B.weight": float("nan")}},
        5,
        ["b", "layer.q.lora_B.weight", "NaN or infinite"],
    ),
    "infinite": (
        {"changed": {"lora_A.weight": float("inf")}},
        5,
        ["b", "layer.q.lora_A.weight", "NaN or infinite"],
    ),
    "alpha": ({"lora_alpha": float("inf")}, 3, ["b/adapter_config.json", "lora_alpha"]),
    "kind": ({"peft_type": "VERA"}, 3, ["b", "the config says VERA"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_adapters_that_do_not_belong_together(adapters, run, case) -> None:
    settings, code, words = BROKEN[case]
    write(adapters / "b", **settings)
    assert_refused(run, adapters, MERGE, code, *words)


REQUESTS = {
    "method": (["-m", "task-arithmetics"], 4, ["Did you mean 'task-arithmetic'?"]),
    "needs-base": (["-m", "slerp"], 4, ["slerp", "--base"]),
    "rank-zero": (["--rank", "0"], 4, ["output.rank: must be a number, energy:SHARE"]),
    "rank-negative": (["--rank", "-3"], 4, ["output.rank: must be"]),
    "rank-half": (["--rank", "2.5"], 4, ["output.rank: must be"]),
    "energy-above-one": (["--rank", "energy:1.5"], 4, ["output.rank: must be"]),
    "energy-zero": (["--rank", "energy:0"], 4, ["output.rank: must be"]),
    "parameters-few": (["--rank", "parameters:9"], 4, ["parameters:10 or more"]),
    "full": (["--as", "full"], 4, ["a full checkpoint needs the base model", "--base"]),
    "dora": (["--as", "dora"], 4, ["needs the base model", "--base"]),
    "form": (["--as", "loha"], 4, ["output.form"]),
    "rank-of-full": (["--as", "full", "--base", "base", "--rank", "2"], 4, ["has a rank"]),
    "rank-of-base": (["--base", "base", "--rank", "2"], 4, ["has a rank"]),
    "heads": (["--heads", "keep:3"], 4, ["keep:N", "1 to 2"]),
    "heads-word": (["--heads", "first"], 4, ["average", "keep:N"]),
    "absent": (["--absent", "ignore"], 4, ["absent"]),
    "weights": (["-w", "1"], 2, ["1 --weight for 2 models"]),
    "three-weights": (["-w", "1", "-w", "1", "-w", "1"], 2, ["3 --weight for 2 models"]),
    "weight-nan": (["-w", "1", "-w", "nan"], 4, ["weight"]),
    "parameter": (["--set", "scales=2"], 4, ["scales", "scale"]),
    "dtype": (["--dtype", "int8"], 4, ["floating"]),
    "weight-sum": (
        ["-m", "linear", "-w", "1", "-w", "-1"],
        4,
        ["layer.q", "sum to zero"],
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests_that_cannot_be_met(adapters, run, case) -> None:
    more, code, words = REQUESTS[case]
    assert_refused(run, adapters, [*MERGE, *more], code, *words)


def test_an_output_that_exists_stays_as_it_is(adapters, run) -> None:
    assert run(*MERGE)[0] == 0
    assert_refused(run, adapters, [*MERGE, "-w", "1", "-w", "2"], 3, "out", "already exists")
    assert run(*MERGE, "-w", "1", "-w", "2", "--overwrite")[0] == 0


def test_an_input_is_never_the_output(adapters, run) -> None:
    arguments = ["merge", "a", "b", "-m", "task-arithmetic", "-o", "a", "--overwrite", "-q"]
    assert_refused(run, adapters, arguments, 3, "a")


def test_overflow_of_the_output_dtype_names_the_module(adapters, run) -> None:
    write(adapters / "b", changed={"lora_B.weight": 1e6})
    arguments = [*MERGE, "--dtype", "float16"]
    assert_refused(run, adapters, arguments, 5, "layer.q.lora_B", "infinity", "more range")


def test_json_carries_the_same_facts(adapters, run) -> None:
    write(adapters / "b", rows=7)
    code, out, _ = run(*MERGE[:-1], "--json")
    facts = json.loads(out)
    assert code == facts["exit_code"] == 3
    assert facts["error"] == "AdapterError"
    assert facts["tensor"] == "layer.q"
    assert not (adapters / "out").exists()


def test_several_problems_are_told_at_once(adapters, run) -> None:
    write(adapters / "b", rows=7, base_model_name_or_path="org/other", fan_in_fan_out=True)
    words = ["3 problems", "different shapes", "different base models", "fan_in_fan_out differ"]
    assert_refused(run, adapters, MERGE, 3, *words)
