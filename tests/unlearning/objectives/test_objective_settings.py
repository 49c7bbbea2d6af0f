"""The catalogue of objectives and what binding one decides, checks and keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from objective_cases import tiny_gpt2, tiny_llama, unlearning_batch

from orthomerge import catalogue
from orthomerge.errors import NumericalError, ProblemsError, RecipeError, UnknownNameError
from orthomerge.unlearning.objectives import Need, all_objectives, get_objective, registry

NAMES = [
    *("ceu", "dpo", "ga", "grad-diff", "idk", "npo"),
    *("pdu", "rmu", "satimp", "simnpo", "undial", "wga"),
]


def test_all_objectives_are_there_with_their_facts() -> None:
    assert list(all_objectives()) == NAMES
    for info in all_objectives().values():
        assert info.summary.endswith(".")
        assert info.reference.startswith("arXiv:")
        assert all(parameter.help for parameter in info.parameters.values())


def test_names() -> None:
    assert get_objective("idk-dpo").name == "dpo"
    with pytest.raises(UnknownNameError, match="'simnpo'"):
        get_objective("simpno")


def test_listing_imports_no_torch() -> None:
    script = (
        "import sys; from orthomerge.unlearning.objectives import all_objectives\n"
        "print(len(all_objectives()), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(len(NAMES)), "False"]


def test_needs_follow_from_the_signature_and_the_retain_loss() -> None:
    dpo = {Need.REFERENCE_SCORES, Need.ALTERNATES}
    assert get_objective("dpo").bind().needs == dpo
    assert get_objective("dpo").bind(retain="kl").needs == dpo | {Need.REFERENCE_LOGITS}
    assert get_objective("rmu").bind().needs == {Need.HIDDEN, Need.REFERENCE_HIDDEN}
    assert not get_objective("ga").bind().needs_retain
    assert get_objective("npo").bind().needs_retain


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ProblemsError) as caught:
        get_objective("pdu").bind(dual_stp=1.0, update="day", retain="none", forget_weight=-1.0)
    text = str(caught.value)
    assert all(word in text for word in ("dual_step", "update", "tolerance", "forget_weight"))
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(
    "settings", [{"retain": "none", "retain_weight": 1.0}, {"retain": "hidden"}, {"beta": 0.0}]
)
def test_what_does_not_fit_is_refused(settings) -> None:
    with pytest.raises(RecipeError):
        get_objective("npo").bind(**settings)


def test_what_is_missing_is_named() -> None:
    model, batch = tiny_llama(), unlearning_batch()
    with pytest.raises(RecipeError, match="no reference"):
        get_objective("npo").bind().forget_loss(model, None, batch)
    del batch["alternate"], batch["retain"]
    with pytest.raises(RecipeError, match="alternate rows"):
        get_objective("idk").bind().forget_loss(model, None, batch)
    with pytest.raises(RecipeError, match="retain rows"):
        get_objective("grad-diff").bind().retain_loss(model, None, batch)
    assert get_objective("ga").bind().retain_loss(model, None, batch) is None


def test_a_dual_variable_follows_the_retain_loss() -> None:
    objective = get_objective("pdu").bind(tolerance=0.5, dual_step=2.0, warmup_epochs=1.0)
    objective.after_step(0.9, epoch=1.0)
    assert objective.retain_weight == 1.0
    objective.after_step(0.75, epoch=1.5)
    assert objective.retain_weight == 1.5
    objective.after_step(-3.0, epoch=2.0)
    assert objective.retain_weight == 0.0
    with pytest.raises(NumericalError):
        objective.after_step(float("nan"), epoch=2.1)
    with pytest.raises(RecipeError, match="epoch"):
        objective.after_step(1.0)


def test_a_dual_variable_can_follow_the_mean_of_an_epoch() -> None:
    make = get_objective("pdu").bind
    first = make(tolerance=0.5, warmup_epochs=0.0, update="epoch")
    first.after_step(1.0, epoch=1 / 3)
    first.after_step(2.0, epoch=2 / 3)
    second = make(tolerance=0.5, warmup_epochs=0.0, update="epoch")
    second.load_state_dict(first.state_dict())
    assert second.retain_weight == 1.0
    second.after_step(3.0, epoch=1.0)
    assert second.retain_weight == 2.5


def test_the_layer_and_the_direction_of_rmu() -> None:
    model, batch = tiny_gpt2(), unlearning_batch()
    model.eval()
    with pytest.raises(RecipeError, match="0 to 2"):
        get_objective("rmu").bind(layer=3).forget_loss(model, None, batch)
    objective = get_objective("rmu").bind(layer=1, steering=3.0)
    found = objective.forget_loss(model, None, batch)
    states = model(**{k: batch["forget"][k] for k in ("input_ids", "attention_mask")},
                   output_hidden_states=True).hidden_states[2]  # fmt: skip
    direction = objective.state_dict()["direction"]
    torch.testing.assert_close(direction.norm(), torch.tensor(1.0))
    mask = batch["forget"]["labels"] != -100
    rows = [(states[i][mask[i]] - 3 * direction).square().mean() for i in range(3)]
    torch.testing.assert_close(found, torch.stack(rows).mean())
    other = get_objective("rmu").bind(layer=1, seed=1)
    other.forget_loss(model, None, batch)
    assert not torch.allclose(other.state_dict()["direction"], direction)


def test_hidden_states_without_gradient_are_refused() -> None:
    model = tiny_gpt2().requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing that is trained"):
        get_objective("rmu").bind().forget_loss(model, None, unlearning_batch())


def test_entry_points_are_loaded(monkeypatch) -> None:
    loaded = []

    class EntryPoint:
        def load(self):
            loaded.append(True)

    def installed(group):
        assert group == "orthomerge.unlearning_objectives"
        return [EntryPoint()]

    monkeypatch.setattr(catalogue, "entry_points", installed)
    registry._load_all.__wrapped__()
    assert loaded == [True]


def test_a_registration_must_be_sound(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    def wrong(scores): ...

    with pytest.raises(TypeError, match="scores"):
        registry.objective("wrong", reference="none")(wrong)
    with pytest.raises(ValueError, match="two objectives"):
        registry.objective("ga", reference="none")(wrong)
