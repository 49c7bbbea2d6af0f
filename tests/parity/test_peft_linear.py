"""peft-linear gives what PEFT's own "linear" combination gives, on every kind of layer."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from adapter_models import Layers, assert_same, make_adapter, peft_merge

from orthomerge import merge, plan
from orthomerge.errors import OrthoMergeError, RecipeError
from orthomerge.linalg.factors import Factors
from orthomerge.merging.methods.peft_linear import peft_linear

TARGETS = ["up", "down", "conv", "point", "embed", "turned"]
SETTINGS = [  # scales 2, 1/3 and, by module, 4/3 or 2
    {"lora_alpha": 6},
    {"lora_alpha": 1},
    {"lora_alpha": 4, "alpha_pattern": {"up": 6, "embed": 6}},
]


def make(folder: Path, **options) -> list[Path]:
    configs = [
        peft.LoraConfig(**{"target_modules": TARGETS, "r": 3, **own, **options}) for own in SETTINGS
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [make_adapter(folder / f"a{i}", config, seed=i) for i, config in enumerate(configs)]


def by_peft(folders: list[Path], weights: list[float], combination: str) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(Layers(), folders[0], adapter_name="0")
        for position, folder in enumerate(folders[1:], start=1):
            model.load_adapter(folder, adapter_name=str(position))
        names = [str(position) for position in range(len(folders))]
        model.add_weighted_adapter(names, weights, "merged", combination_type=combination)
        model.set_adapter("merged")
        return dict(model.merge_and_unload(adapter_names=["merged"]).state_dict())


@pytest.mark.parametrize(
    "weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25], [1.0, -0.5, 0.7], [-1.0, -2.0, 0.0]], ids=str
)
def test_equals_peft(tmp_path, weights) -> None:
    folders = make(tmp_path)
    theirs = by_peft(folders, weights, "linear")
    merge(folders, method="peft-linear", weights=weights, output=tmp_path / "merged")
    moved = assert_same(peft_merge(tmp_path / "merged"), theirs, 1e-5)
    assert len(moved) == len(TARGETS)


def test_is_not_the_sum_that_peft_calls_cat(tmp_path) -> None:
    folders, weights = make(tmp_path), [1.0, -0.5, 0.7]
    merge(folders, method="peft-linear", weights=weights, output=tmp_path / "linear")
    merge(folders, method="cat", weights=weights, output=tmp_path / "cat")
    assert_same(peft_merge(tmp_path / "cat"), by_peft(folders, weights, "cat"), 1e-5)
    linear, cat = (peft_merge(tmp_path / name) for name in ("linear", "cat"))
    base = Layers().state_dict()
    name = "body.up.weight"
    change = cat[name] - base[name]
    assert (linear[name] - cat[name]).norm() > 0.5 * change.norm()


def test_plan_and_result_say_what_it_is(tmp_path) -> None:
    folders = make(tmp_path)
    planned = plan(folders, method="peft-linear")
    assert any("for comparison only" in note for note in planned.notes)
    (task,) = [t for t in planned.tasks if "up.lora_A" in t.name]
    assert task.info.shape[0] == 3


def test_unequal_ranks_are_refused_before_anything_is_read(tmp_path) -> None:
    first = make(tmp_path)[0]
    config = peft.LoraConfig(target_modules=TARGETS, r=4)
    second = make_adapter(tmp_path / "other", config)
    with pytest.raises(OrthoMergeError, match="these have 3, 4") as caught:
        plan([first, second], method="peft-linear")
    assert "task-arithmetic" in str(caught.value)


def test_a_module_that_one_adapter_lacks_is_the_others(tmp_path) -> None:
    first = make(tmp_path)[0]
    config = peft.LoraConfig(target_modules=["up", "turned"], r=3, lora_alpha=3)
    second = make_adapter(tmp_path / "other", config, seed=9)
    weights = [0.5, 0.5]
    theirs = by_peft([first, second], weights, "linear")
    merge([first, second], method="peft-linear", weights=weights, output=tmp_path / "merged")
    assert_same(peft_merge(tmp_path / "merged"), theirs, 1e-5)


def test_one_by_one_matrices() -> None:
    """B = 1 and 3, A = 1 and 2 at weight 1/2: 6, though half of 1 · 1 + 3 · 2 is 3.5."""
    parts = [Factors(torch.tensor([[b]]), torch.tensor([[a]])) for b, a in ((1.0, 1.0), (3.0, 2.0))]
    assert peft_linear(parts, weights=[0.5, 0.5]).dense().item() == pytest.approx(6.0)
    with pytest.raises(RecipeError, match="one rank"):
        peft_linear([parts[0], Factors(torch.ones(1, 2), torch.ones(2, 1))], weights=[1.0, 1.0])


def test_sizes_of_the_factors_are_those_that_peft_stores() -> None:
    """The scale is shared between the factors, whatever it was; a negative weight turns A only."""
    torch.manual_seed(0)
    stored = [Factors(torch.randn(4, 2), torch.randn(2, 5)) for _ in range(2)]
    scales, weights = [4.0, 0.25], [1.0, -9.0]
    given = [Factors(F.B * s, F.A) for F, s in zip(stored, scales, strict=True)]
    merged = peft_linear(given, weights=weights, folded=scales)
    torch.testing.assert_close(merged.B, 2 * stored[0].B + 1.5 * stored[1].B)
    torch.testing.assert_close(merged.A, 2 * stored[0].A - 1.5 * stored[1].A)
