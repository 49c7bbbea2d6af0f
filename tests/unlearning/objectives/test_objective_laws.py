"""Laws that every registered objective obeys, on models and on bare tensors."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from objective_cases import (
    REQUIRED,
    copied,
    moved,
    selected,
    tiny_gpt2,
    tiny_llama,
    unlearning_batch,
    with_adapter,
    without_answer,
)

from orthomerge.unlearning.objectives import AdapterOff, FrozenCopy, all_objectives, sequence_losses
from orthomerge.unlearning.objectives.registry import ObjectiveInfo

OBJECTIVES = all_objectives()
EACH = pytest.mark.parametrize("info", OBJECTIVES.values(), ids=list(OBJECTIVES))
RAISING = {"ga", "grad-diff", "npo", "simnpo", "dpo", "wga", "satimp"}
DETACHED = {"wga", "satimp"}  # their gradient leaves the weights out: it is not that of the value
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}


def bound(info: ObjectiveInfo, **settings: Any) -> Any:
    return info.bind(**REQUIRED.get(info.name, {}), **settings)


@functools.cache
def plain() -> tuple[Any, Any]:
    """Return a model that has moved away from its reference; not to be changed."""
    model = tiny_llama()
    reference = FrozenCopy(model)
    return moved(model), reference


@functools.cache
def adapted() -> tuple[Any, Any]:
    model = with_adapter(tiny_llama())
    reference = AdapterOff(model)
    return moved(model, by=0.3), reference


def both(objective: Any, model: Any, ref: Any, batch: Any) -> torch.Tensor:
    parts = objective.components(model, ref, batch)
    return torch.stack([parts.forget.detach(), parts.retain.detach()])


def gradients(loss: torch.Tensor, model: Any) -> list[torch.Tensor | None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True))


@EACH
@pytest.mark.parametrize("case", [plain, adapted], ids=["plain", "lora"])
def test_losses_and_gradients_are_finite_and_not_zero(
    info: ObjectiveInfo, case: Callable[[], Any]
) -> None:
    model, ref = case()
    objective = bound(info)
    for loss in (objective.forget_loss, objective.retain_loss):
        value = loss(model, ref, unlearning_batch())
        assert value.shape == ()
        assert math.isfinite(value.item())
        found = [g for g in gradients(value, model) if g is not None]
        assert all(bool(g.isfinite().all()) for g in found)
        assert sum(float(g.norm()) for g in found) > 0


@EACH
@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_the_order_of_the_rows_does_not_matter(info: ObjectiveInfo, retain: str) -> None:
    objective, batch = bound(info, retain=retain), unlearning_batch()
    straight = both(objective, *plain(), batch)
    turned = both(objective, *plain(), selected(batch, [2, 0, 1]))
    torch.testing.assert_close(straight, turned, **CLOSE)


@EACH
@pytest.mark.parametrize("retain", ["nll", "kl", None], ids=["nll", "kl", "own"])
def test_padding_does_not_matter(info: ObjectiveInfo, retain: str | None) -> None:
    objective = bound(info, retain=retain)
    short = both(objective, *plain(), unlearning_batch())
    long = both(objective, *plain(), unlearning_batch(more=3))
    torch.testing.assert_close(short, long, **CLOSE)


@EACH
def test_a_row_without_answer_does_not_count(info: ObjectiveInfo) -> None:
    objective, batch = bound(info), unlearning_batch()
    without = both(objective, *plain(), selected(batch, [0, 2]))
    empty = both(objective, *plain(), without_answer(batch, 1))
    torch.testing.assert_close(without, empty, **CLOSE)


@EACH
@pytest.mark.parametrize("compat", [False, True])
def test_a_batch_without_answers_is_no_loss_and_no_gradient(
    info: ObjectiveInfo, compat: bool
) -> None:
    if compat and info.name == "undial":
        pytest.skip("its published code averages over prompts")
    objective = bound(info, compat=compat)
    batch = selected(without_answer(unlearning_batch(), 0), [0])
    model, ref = plain()
    for loss in (objective.forget_loss, objective.retain_loss):
        value = loss(model, ref, batch)
        assert value.item() == 0
        assert all(not g.any() for g in gradients(value, model) if g is not None)


@EACH
def test_micro_batches_add_up_by_their_counts(info: ObjectiveInfo) -> None:
    objective, batch = bound(info), unlearning_batch()
    model, ref = plain()
    for loss, count in (
        (objective.forget_loss, objective.forget_count),
        (objective.retain_loss, objective.retain_count),
    ):
        whole = loss(model, ref, batch).detach()
        parts = [selected(batch, [0]), selected(batch, [1, 2])]
        counts = [int(count(part)) for part in parts]
        assert counts[0] != counts[1], "equal counts would not tell"
        total = sum(
            n * loss(model, ref, part).detach() for n, part in zip(counts, parts, strict=True)
        )
        torch.testing.assert_close(total / sum(counts), whole, **CLOSE)


@EACH
def test_inputs_and_the_model_stay_as_they_are(info: ObjectiveInfo) -> None:
    batch = unlearning_batch()
    kept = copied(batch)
    for model, ref in (plain(), adapted()):
        model.train()
        model.base_model.eval()  # an unusual mode, which must come back as well
        modes = [module.training for module in model.modules()]
        flags = [p.requires_grad for p in model.parameters()]
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        bound(info).components(model, ref, batch)
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert all(value.equal(kept[part][key]) for part in batch for key, value in batch[part].items())


@EACH
def test_a_state_restores_the_losses(info: ObjectiveInfo) -> None:
    batch = unlearning_batch()
    settings = {"seed": 7} if "seed" in info.parameters else {}
    first, second = bound(info, **settings), bound(info)
    wanted = both(first, *plain(), batch)
    first.after_step(2.0, epoch=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(both(second, *plain(), batch), wanted, rtol=0, atol=0)
    assert second.retain_weight == first.retain_weight


@EACH
def test_one_step_goes_where_it_should(info: ObjectiveInfo) -> None:
    model = tiny_llama()
    ref = FrozenCopy(model)
    moved(model, by=0.02)
    objective, batch = bound(info), unlearning_batch()

    def scores() -> torch.Tensor:
        with torch.no_grad():
            inputs = {k: batch["forget"][k] for k in ("input_ids", "attention_mask")}
            return sequence_losses(model(**inputs).logits, batch["forget"]["labels"])[0]

    before, likely = objective.forget_loss(model, ref, batch), scores()
    before.backward()
    with torch.no_grad():
        norm = math.sqrt(
            sum(float(p.grad.norm()) ** 2 for p in model.parameters() if p.grad is not None)
        )
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.005 / norm * parameter.grad
    if info.name not in DETACHED:
        assert objective.forget_loss(model, ref, batch) < before
    if info.name in RAISING:
        assert scores().sum() > likely.sum()


@EACH
def test_a_model_in_half_precision_gives_nearly_the_same(info: ObjectiveInfo) -> None:
    half = copy.deepcopy(plain()[0]).bfloat16()
    wide = copy.deepcopy(half).float()
    batch = unlearning_batch()
    found = both(bound(info), half, plain()[1], batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, both(bound(info), wide, plain()[1], batch), rtol=0.1, atol=0.05
    )


@EACH
def test_a_model_of_another_architecture(info: ObjectiveInfo) -> None:
    model = tiny_gpt2()  # with dropout, in training mode
    ref = FrozenCopy(model)
    loss = bound(info).components(moved(model), ref, unlearning_batch())
    assert math.isfinite(loss.forget.item() + loss.retain.item())


# ---- the bare functions ------------------------------------------------------------------------


def tensors(dtype: torch.dtype = torch.float32, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Return inputs for any objective: 2 rows of 5 tokens, 4 dimensions, 9 tokens known."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    labels = torch.tensor([[-100, -100, 2, 8, -100], [-100, 5, 0, 1, 3]])
    return {
        "logits": normal(2, 5, 9), "labels": labels, "reference_logits": normal(2, 5, 9),
        "reference_scores": 3 * normal(2).float().abs(), "hidden": normal(2, 5, 4),
        "direction": torch.full((4,), 0.5), "alternate_logits": normal(2, 5, 9),
        "alternate_labels": labels.flip(0), "alternate_reference_scores": normal(2).float().abs(),
    }  # fmt: skip


def called(info: ObjectiveInfo, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    loss: torch.Tensor = info.function(*(inputs[name] for name in info.arguments), **settings)
    return loss


DIFFERENTIABLE = ("logits", "hidden", "alternate_logits")


def with_gradients(info: ObjectiveInfo, inputs: dict[str, torch.Tensor]) -> Any:
    leaves = {n: inputs[n].clone().requires_grad_() for n in DIFFERENTIABLE if n in info.arguments}
    loss = called(info, {**inputs, **leaves})
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@EACH
def test_only_scored_positions_have_a_gradient(info: ObjectiveInfo) -> None:
    inputs = tensors()
    _, found = with_gradients(info, inputs)
    for name, grad in found.items():
        labels = inputs["alternate_labels" if "alternate" in name else "labels"]
        scored = labels != -100
        if name != "hidden":
            scored = torch.cat([scored[:, 1:], torch.zeros(2, 1, dtype=torch.bool)], 1)
        assert not grad[~scored].any()
        assert bool(grad.any())


@EACH
def test_what_stands_at_unscored_positions_does_not_matter(info: ObjectiveInfo) -> None:
    inputs, changed = tensors(), tensors()
    for name in (*DIFFERENTIABLE, "reference_logits"):
        changed[name][:, 0] = torch.nan if name == "hidden" else changed[name][:, 0]
        changed[name][:, 4] = torch.nan if name != "hidden" else changed[name][:, 4]
    assert called(info, inputs).equal(called(info, changed))


@EACH
def test_half_precision_is_lifted(info: ObjectiveInfo) -> None:
    inputs = tensors(torch.bfloat16)
    lifted = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    loss = called(info, inputs)
    assert loss.dtype == torch.float32
    assert loss.equal(called(info, lifted))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(
    info: ObjectiveInfo, dtype: torch.dtype, scale: float
) -> None:
    sure = tensors(dtype, scale=scale)
    for row, place in ((0, 1), (1, 0), (1, 2)):  # p_t -> 1 at these, near 0 at most others
        target = int(sure["labels"][row, place + 1])
        sure["logits"][row, place, target] = 10 * scale
    for reference in (-1e6, 0.0, 1e6):
        sure["reference_scores"] = torch.full((2,), reference)
        loss, grads = with_gradients(info, sure)
        assert math.isfinite(loss.item())
        assert all(bool(grad.isfinite().all()) for grad in grads.values())


@EACH
def test_tensors_are_not_changed(info: ObjectiveInfo) -> None:
    inputs, kept = tensors(), tensors()
    called(info, inputs)
    assert all(inputs[name].equal(kept[name]) for name in kept)
