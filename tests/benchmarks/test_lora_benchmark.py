"""The benchmark of LoRA merging writes every field; its numbers are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orthomerge.adapters.sources import open_source

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process import the scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_full_adapters_are_those_of_llama_8b() -> None:
    from llama_lora import SHAPES

    shape = SHAPES["full"]
    assert len(shape.modules()) == 224
    assert shape.modules()["model.layers.31.mlp.down_proj"] == (4096, 14336)
    assert abs(4 * shape.parameter_count / 168e6 - 1) < 0.01


def test_generated_adapters_are_seeded_and_open(tmp_path: Path) -> None:
    from llama_lora import SHAPES, generate

    shape = SHAPES["tiny"]
    assert generate(tmp_path / "one", shape, adapters=2, seed=3)
    assert not generate(tmp_path / "one", shape, adapters=2, seed=3)
    generate(tmp_path / "two", shape, adapters=2, seed=4)
    files = [
        (tmp_path / folder / name / "adapter_model.safetensors").read_bytes()
        for folder, name in (("one", "adapter-1"), ("one", "adapter-2"), ("two", "adapter-1"))
    ]
    assert len(set(files)) == 3
    source = open_source(tmp_path / "one" / "adapter-1")
    assert source.lora is not None
    assert {n: (m.rows, *m.shape) for n, m in source.lora.modules.items()} == shape.modules()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="not written by this program"):
        generate(tmp_path / "mine", shape)


def test_the_error_of_a_merge_is_measured(tmp_path: Path) -> None:
    from llama_lora import SHAPES, factors, generate
    from lora_quality import errors
    from safetensors.torch import load_file, save_file

    shape = SHAPES["tiny"]
    generate(tmp_path / "data", shape, adapters=2)
    inputs = [tmp_path / "data" / f"adapter-{i}" for i in (1, 2)]
    found = errors(inputs, inputs[0])
    name = "model.layers.0.self_attn.q_proj"
    first, second = (
        B.double() @ A.double()
        for B, A in (factors(name, shape.modules()[name], shape.rank, i, 0) for i in (0, 1))
    )
    total = (first + second) / 2
    values = torch.linalg.svdvals(total)
    assert found[name]["sum"] == pytest.approx(
        float(torch.linalg.norm(first - total) / torch.linalg.norm(total)), rel=1e-5
    )
    U, S, Vh = torch.linalg.svd(total)
    cut = (U[:, : shape.rank] * S[: shape.rank]) @ Vh[: shape.rank]
    assert found[name]["truncated"] == pytest.approx(
        float(torch.linalg.norm(first - cut) / torch.linalg.norm(cut)), rel=1e-5
    )
    assert np.count_nonzero(values.numpy() > 1e-6) == 2 * shape.rank
    file = inputs[0] / "adapter_model.safetensors"
    save_file({k: v * 2 if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    assert errors(inputs, inputs[0])[name]["sum"] != pytest.approx(found[name]["sum"])


def test_every_floor_and_merge_of_a_round_is_named_once() -> None:
    from lora_contenders import contenders

    order = contenders("full", dense=True)
    names = [one.name for one in order]
    assert len(set(names)) == len(names) == 16
    assert {one.floor for one in order if one.floor} <= set(names)
    dense = [one for one in order if one.once]
    assert {one.scale for one in dense} == {"layer"}
    sizes = {one.name: int(one.command[-1]) for one in order if "floor" in one.name}
    assert sizes["floor-lossless"] == 8 * sizes["floor-one-rank"]


def test_the_traffic_floor_writes_what_it_is_told(tmp_path: Path) -> None:
    from floors import traffic
    from llama_lora import SHAPES, generate

    generate(tmp_path / "data", SHAPES["tiny"], adapters=2)
    inputs = [tmp_path / "data" / f"adapter-{i}" for i in (1, 2)]
    traffic(inputs, tmp_path / "out", 3_000_001)
    (file,) = (tmp_path / "out").iterdir()
    assert file.stat().st_size == 3_000_001


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lora_writes_every_field(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "lora.py"), "--quick", "--data", str(tmp_path)]
    done = subprocess.run(
        [*command, "--results", str(result)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = result.read_text()
    assert str(tmp_path) not in text, "a result file names no path of this machine"
    assert str(BENCHMARKS.parent) not in text
    found = json.loads(text)
    assert found["failures"] == {}
    assert set(found["summary"]) == set(found["samples"]) == set(found["commands"])
    for name in ("orthomerge-task-arithmetic", "orthomerge-svd", "peft-cat"):
        assert found["summary"][name]["error"] < 1e-5, name
    assert found["summary"]["peft-linear"]["error"] > 0.1  # it sums the factors, not the products
    assert {row["target"].partition(":")[0] for row in found["targets"]} == {"do-merging", "svd"}
    assert set(found["scaling"]) == {"adapters", "rank", "hidden"}
    for series in found["scaling"].values():
        assert all(row["seconds_per_module"] > 0 for row in series)
    import lora_tables

    for table in (lora_tables.lora_speed, lora_tables.lora_growth):
        rows = table(found)
        assert len({row.count("|") for row in rows}) == 1
