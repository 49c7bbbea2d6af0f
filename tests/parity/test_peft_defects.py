"""Merges that PEFT's ``add_weighted_adapter`` gets wrong: ours against fp64, PEFT as recorded.

The cases and both tools' answers are those of benchmarks/peft_cases.py; the record they are held
to is benchmarks/results/peft_defects.json.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from lora_oracles import apart, changes, elected, in_knots, pruned, weighted_mean  # noqa: E402
from peft_cases import CASES, Case, answers  # noqa: E402

RECORD = json.loads((BENCHMARKS / "results" / "peft_defects.json").read_text("utf-8"))
BY_NAME = {case.name: case for case in CASES}
RIGHT = 1e-6  # PEFT turns the weights into float32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Both tools' answers, each case asked once."""
    return {case.name: answers(case, tmp_path_factory.mktemp("case")) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_the_truth_or_a_refusal(found: dict[str, Any], case: Case) -> None:
    ours = found[case.name]["ours"]
    if case.refused is None:
        assert ours["relative_error"] <= case.tolerance, ours
    else:
        assert ours["error"] in ("AdapterError", "OutputError", "RecipeError"), ours
        assert case.refused in ours["text"]


@pytest.mark.parametrize("name", BY_NAME)
def test_peft_answers_as_recorded(found: dict[str, Any], name: str) -> None:
    """A failure means that PEFT changed its answer: run benchmarks/peft_defects.py."""
    record = RECORD["peft"].get(version("peft"))
    if record is None:
        pytest.skip(f"PEFT {version('peft')} is not on record: run benchmarks/peft_defects.py")
    theirs, recorded = found[name]["peft"], record["answers"][name]
    assert theirs.keys() == recorded.keys()
    if "error" in recorded:
        assert theirs["error"] == recorded["error"]
    elif recorded["relative_error"] <= RIGHT:
        assert theirs["relative_error"] <= RIGHT
    else:
        assert theirs["relative_error"] == pytest.approx(recorded["relative_error"], rel=0.02)


def test_the_record_is_of_these_cases() -> None:
    assert [row["name"] for row in RECORD["cases"]] == list(BY_NAME)
    for facts in RECORD["peft"].values():
        assert facts["answers"].keys() == BY_NAME.keys()


def test_quantiles_have_the_limit_that_is_on_record() -> None:
    """``svd_clamp`` is ``torch.quantile`` of U and V^T together."""
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(torch.zeros(1).expand((1 << 24) + 1), 0.5)


FIRST = np.array([[1.0, 0, 2], [2, 0, 3], [0, 0, -1]])
SECOND = np.array([[1.0, -1, 1], [2, 1, 0], [3, 0, 1]])


def test_oracles_against_values_worked_out_by_hand() -> None:
    pair, even = [FIRST, SECOND], [1.0, 1.0]
    mean = [[1, -0.5, 1.5], [2, 0.5, 1.5], [1.5, 0, 0]]
    np.testing.assert_allclose(weighted_mean(pair, even), mean)
    ties = [[1, -1, 1.5], [2, 1, 3], [3, 0, 1]]
    np.testing.assert_allclose(elected(1.0)(pair, even), ties)
    knots = [[0.8411, -1, 1.6513], [1.6539, 1, 1.8296], [2.8961, 0, -1.3298]]
    np.testing.assert_allclose(in_knots(elected(1.0))(pair, even), knots, atol=5e-5)
    largest = [[0, 0, 2], [2, 0, 3], [0, 0, 0]]  # a third of nine
    np.testing.assert_allclose(pruned(1 / 3)([FIRST], [1.0]), largest)
    assert float(elected(1.0)([np.array([4.0]), np.array([-3.0])], [-1.0, 1.0])[0]) == -3.5
    assert float(elected(1.0)([np.array([1.0]), np.array([-5.0])], [1.0, 0.1])[0]) == 1.0


def test_the_error_is_that_of_the_worst_tensor() -> None:
    wanted = {"large": np.array([100.0]), "small": np.array([1.0]), "still": np.array([0.0])}
    assert apart(wanted, wanted) == 0
    assert apart({**wanted, "small": np.array([1.5])}, wanted) == 0.5
    assert apart({"large": np.array([100.0])}, wanted) == 1.0
    assert apart({**wanted, "more": np.array([10.0])}, wanted) == 0.1
    assert np.isnan(apart({**wanted, "large": np.array([np.nan])}, wanted))


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora", "lora_bias"])
def test_changes_are_read_as_the_config_says(tmp_path: Path, kind: str) -> None:
    """One module of rank 1 with numbers that can be followed."""
    from safetensors.torch import save_file

    prefix = "base_model.model.up."
    B, A = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0]])
    tensors = {f"{prefix}lora_A.weight": A.repeat(4, 1), f"{prefix}lora_B.weight": B.repeat(1, 4)}
    if kind == "use_dora":
        tensors[f"{prefix}lora_magnitude_vector"] = torch.tensor([10.0, 20.0])
    if kind == "lora_bias":
        tensors[f"{prefix}lora_B.bias"] = torch.tensor([1.0, -1.0])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 3, "alpha_pattern": {"up": 2}, kind: True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = changes(tmp_path, {"up.weight": np.array([[1.0, 0], [0, 6]])})
    wanted = {
        "use_rslora": [[12, 0], [16, 0]],  # 2 / sqrt(4) of 4 times
        "lora_bias": [[6, 0], [8, 0]],  # 2 / 4 of 4 times
        "use_dora": [[9, 0], [16, 6]],  # [7, 0] / 7 * 10 and [8, 6] / 10 * 20, less the base
    }[kind]
    np.testing.assert_allclose(found["up.weight"], wanted)
    if kind == "lora_bias":
        np.testing.assert_allclose(found["up.bias"], [0.5, -0.5])
