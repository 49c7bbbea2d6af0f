"""Settings that would be ignored are refused; those that count are part of what is resumed."""

from __future__ import annotations

import pytest
import torch
from lora_adapters import MODULES, state

from orthomerge.errors import OrthoMergeError
from orthomerge.recipe.run import plan

BASE = {f"{name}.weight": torch.zeros(shape) for name, shape in MODULES.items()}
FEWER = dict(list(MODULES.items())[:3])


@pytest.mark.parametrize("method", ["ties", "do-merging"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output_settings": {"style": "kohya"}}, "only a merged LoRA adapter has a style"),
    ],
)
def test_what_full_weights_do_not_have_is_refused(method, settings, words) -> None:
    adapters = [state(1, 2), state(2, 3)]
    with pytest.raises(OrthoMergeError, match=words):
        plan(adapters, base=BASE, method=method, **settings)


@pytest.mark.parametrize("absent", ["skip", "error"])
def test_absent_modules_of_whole_models(absent) -> None:
    """Task vectors of full weights have zeros there; methods of factors can do as they are told."""
    adapters = [state(1, 2), state(2, 3, FEWER)]
    settings = {"base": BASE, "adapter_settings": {"absent": absent}}
    with pytest.raises(OrthoMergeError, match="no module is absent"):
        plan(adapters, method="ties", **settings)
    if absent == "skip":
        assert plan(adapters, method="do-merging", **settings)
        return
    with pytest.raises(OrthoMergeError, match="6 of 9 modules are not in every adapter"):
        plan(adapters, method="do-merging", **settings)
    assert plan([state(1, 2), state(2, 3)], method="do-merging", **settings)


@pytest.mark.parametrize("method", ["ties", "do-merging"])
def test_adapters_of_different_bases_are_refused_with_a_base_too(method) -> None:
    adapters = [state(at, 2, base_model_name_or_path=f"org/{at}") for at in (1, 2)]
    with pytest.raises(OrthoMergeError, match="name different base models"):
        plan(adapters, base=BASE, method=method)
    assert plan(adapters, base=BASE, method=method, adapter_settings={"assume_same_base": True})


def test_how_absent_modules_count_is_part_of_what_is_resumed() -> None:
    adapters, output = [state(1, 2), state(2, 3, FEWER)], {"provenance": False}
    hashes = {
        plan(adapters, output_settings=output, adapter_settings={"absent": absent}).hash()
        for absent in ("zero", "skip")
    }
    assert len(hashes) == 2


@pytest.mark.parametrize("base", [None, BASE])
@pytest.mark.parametrize("method", ["do-merging", "task-arithmetic"])
def test_weights_that_leave_nothing_are_noted(method, base) -> None:
    adapters = [state(1, 2), state(2, 3)]
    note = "all weights are 0: nothing of the models is merged"
    for weights, noted in (([0.0, 0.0], True), ([0.0, 1.0], False), (None, False)):
        assert (note in plan(adapters, base=base, method=method, weights=weights).notes) == noted
