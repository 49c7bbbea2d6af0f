"""The benchmark scripts run and write every field; their numbers are not judged here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orthomerge.checkpoints.sources import open_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

MEASURED = {"wall_seconds", "cpu_seconds", "peak_rss_bytes", "peak_anonymous_bytes"}
COMMON = {
    "benchmark",
    "command",
    "machine",
    "versions",
    "mergekit_versions",
    "seed",
    "scale",
    "notes",
}
CONTENDERS = {
    "copy-floor", "average-floor", "orthomerge-linear", "orthomerge-task-arithmetic",
    "orthomerge-ties", "orthomerge-linear-shards-200MB", "orthomerge-linear-shards-5GB",
    "orthomerge-help", "orthomerge-plan",
}  # fmt: skip


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process import the scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_script(name: str, tmp_path: Path) -> dict[str, Any]:
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / name), "--quick", "--data", str(tmp_path)]
    done = subprocess.run(
        [*command, "--results", str(result)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = result.read_text()
    assert str(tmp_path) not in text, "a result file names no path of this machine"
    assert str(BENCHMARKS.parent) not in text
    return dict(json.loads(text))


@pytest.mark.usefixtures("benchmarks")
def test_generated_models_load_and_have_the_counted_size(tmp_path: Path) -> None:
    import llama_shaped

    shape = llama_shaped.SHAPES["tiny"]
    assert llama_shaped.generate(tmp_path / "models", shape, fine_tunes=1, seed=3)
    assert not llama_shaped.generate(tmp_path / "models", shape, fine_tunes=1, seed=3)
    base, tuned = (open_checkpoint(tmp_path / "models" / n) for n in ("base", "fine-tune-1"))
    assert {name: info.shape for name, info in base.tensors.items()} == shape.tensors()
    assert sum(info.numel for info in base.tensors.values()) == shape.parameter_count
    assert len(base.files) == 4
    for name in shape.tensors():
        before, after = base.read(name).float(), tuned.read(name).float()
        change = (after - before).square().mean().sqrt() / before.square().mean().sqrt()
        assert 0.004 < change < 0.06, name


@pytest.mark.usefixtures("benchmarks")
def test_generation_is_seeded(tmp_path: Path) -> None:
    import llama_shaped

    def content(folder: str, seed: int) -> bytes:
        llama_shaped.generate(tmp_path / folder, llama_shaped.SHAPES["tiny"], seed=seed)
        return next((tmp_path / folder / "fine-tune-2").glob("*-00001-*")).read_bytes()

    assert content("one", 0) == content("two", 0) != content("three", 1)


@pytest.mark.usefixtures("benchmarks")
def test_the_full_scale_has_374_million_parameters() -> None:
    import llama_shaped

    shape = llama_shaped.SHAPES["full"]
    assert sum(map(math.prod, shape.tensors().values())) == shape.parameter_count
    assert abs(shape.parameter_count / 374e6 - 1) < 0.01


@pytest.mark.usefixtures("benchmarks")
def test_folders_of_others_are_not_replaced(tmp_path: Path) -> None:
    import llama_shaped

    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="not written by this program"):
        llama_shaped.generate(tmp_path, llama_shaped.SHAPES["tiny"])
    assert (tmp_path / "mine").exists()


@pytest.mark.usefixtures("benchmarks")
def test_fp64_is_rounded_once_to_nearest_even() -> None:
    from fp64_oracle import round_to_bf16

    one, step = 1.0, 2.0**-7
    halfway = torch.tensor([one + step / 2, one + 1.5 * step], dtype=torch.float64)
    assert round_to_bf16(halfway).tolist() == [one, one + 2 * step]
    above = halfway + 2.0**-50  # fp32 cannot see it: two roundings would give 1.0
    assert round_to_bf16(above).tolist() == [one + step, one + 2 * step]
    assert above[0].to(torch.bfloat16).item() == one
    tiny = torch.tensor([1.5 * 2.0**-133, -0.4 * 2.0**-133, 0.0], dtype=torch.float64)
    assert round_to_bf16(tiny).tolist() == [2.0**-132, 0.0, 0.0]


@pytest.mark.usefixtures("benchmarks")
def test_ulp_distance_counts_the_values_between() -> None:
    from fp64_oracle import ulp_distance

    a = torch.tensor([1.0, 1.0, 0.0, -(2.0**-133)], dtype=torch.bfloat16)
    b = torch.tensor([1.0 + 2.0**-7, 1.0, -0.0, 2.0**-133], dtype=torch.bfloat16)
    assert ulp_distance(a, b).tolist() == [1, 0, 0, 2]


@pytest.mark.usefixtures("benchmarks")
def test_a_run_over_changing_sources_is_refused() -> None:
    from circumstances import check_sources, versions

    measured = versions()
    check_sources(measured)
    with pytest.raises(SystemExit, match="changed during the run"):
        check_sources(measured | {"sources_sha256": "of an earlier state"})


def test_a_terminated_measurement_takes_its_child_along(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from processes import end_children_on_terminate, measure\n"
        "end_children_on_terminate()\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "measure([sys.executable, '-c', child], Path('.'), Path(sys.argv[1]), os.environ)"
    )
    log = tmp_path / "log.txt"
    parent = subprocess.Popen([sys.executable, "-c", code, str(log)], cwd=BENCHMARKS)
    try:
        deadline = time.monotonic() + 30
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        parent.terminate()
        assert parent.wait(timeout=20) == 143
    finally:
        parent.kill()
        parent.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.slow
def test_merge_speed_writes_every_field(tmp_path: Path) -> None:
    result = run_script("merge_speed.py", tmp_path)
    own = {"inputs", "rounds", "commands", "mergekit_configs", "summary", "targets", "samples"}
    assert set(result) == COMMON | own
    assert set(result["samples"]) == set(result["summary"]) == set(result["commands"]) == CONTENDERS
    for name, (sample,) in result["samples"].items():
        assert set(sample) == MEASURED | {"load_before"}
        assert sample["wall_seconds"] > 0
        assert sample["cpu_seconds"] > 0
        assert sample["peak_rss_bytes"] > 1e6
        assert set(result["summary"][name]) == MEASURED | {"ratios"}
    assert "average-floor" in result["summary"]["orthomerge-ties"]["ratios"]
    assert len(result["targets"]) == 12
    unmeasured = {row["target"] for row in result["targets"] if row["met"] is None}
    assert len(unmeasured) == 6
    assert all("mergekit" in target for target in unmeasured)
    assert set(result["machine"]) == {"cpu", "cores", "memory_bytes", "system", "load_average"}


@pytest.mark.slow
def test_merge_exactness_writes_every_field(tmp_path: Path) -> None:
    result = run_script("merge_exactness.py", tmp_path)
    assert set(result) == COMMON | {"tensors", "methods"}
    assert set(result["methods"]) == {"linear", "task-arithmetic", "ties", "slerp"}
    for method, facts in result["methods"].items():
        figures = facts["tools"]["orthomerge"]
        assert figures["tensors"] == len(result["tensors"]) == 18
        assert sum(figures["not_correctly_rounded_by_cause"].values()) <= figures["elements"] / 100
        assert figures["largest_decided_error_in_input_ulps"] < 0.51, method
        assert figures["relative_error"] == pytest.approx(
            figures["relative_error_rounded_once"], rel=1e-3
        )


def test_geometry_writes_every_field(tmp_path: Path) -> None:
    result = run_script("geometry.py", tmp_path)
    assert {"command", "machine", "versions", "threads", "seed", "rounds"} <= set(result)
    assert [row["name"] for row in result["layers"]] == ["square", "tall", "wide", "widest"]
    for row in result["layers"]:
        wide = row["name"].startswith("wide")
        assert row["reductions"] == (["qr-core", "subspace"] if wide else ["dense", "dense"])
        assert row["times"]["reference"]["best_seconds"] > 0
        assert row["relative_move"]["ours-1e-06"] < 0.05
        assert set(row["reference_over_ours"]) == {"1e-06", "0.001"}
    for row in result["polar"]:
        for method in ("svd", "eigh", "newton", "qdwh", "quintic"):
            assert row["methods"][method]["error"] < (0.01 if row["dtype"] == "float32" else 1e-7)
    assert len(result["targets"]) == 8


@pytest.mark.slow
def test_peft_defects_writes_every_field(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = run_script("peft_defects.py", tmp_path)
    assert {"command", "machine", "versions", "rounds", "notes"} <= set(result)
    assert [row["name"] for row in result["cases"]] == list(result["ours"])
    (facts,) = result["peft"].values()
    assert set(facts) == {"transformers", "torch", "answers"}
    assert set(facts["answers"]) == set(result["ours"])
