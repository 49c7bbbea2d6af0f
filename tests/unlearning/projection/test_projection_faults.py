"""What goes wrong without a word: dead hooks, replaced storage, loss scales, unseen values."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import tiny_projection as tiny
import torch

from orthomerge.errors import RecipeError, VerificationError
from orthomerge.unlearning import RetainProjectionCallback, RetainProjector
from orthomerge.unlearning.projection import FiniteStep

RETAIN, FORGET = tiny.batch(1), tiny.batch(2)


@pytest.fixture
def model():
    return tiny.TinyTransformer().double()


def projector_for(model, **settings):
    return RetainProjector(model, **({"row_dtype": torch.float64} | settings))


def adamw(model, **changes):
    return torch.optim.AdamW(model.parameters(), **({"lr": 1e-3, "weight_decay": 0.1} | changes))


def window(model, projector, scaler=None, **arguments):
    projector.update(tiny.nll(model, RETAIN))
    loss = -tiny.nll(model, FORGET)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return projector.project_(**arguments)


@pytest.mark.parametrize("place", ["forget", "retain"])
@pytest.mark.filterwarnings("ignore:.*not protected")
def test_values_that_are_not_finite_out_of_scope_skip_the_window(model, place) -> None:
    """Clipping by the global norm would carry one NaN into every parameter."""
    projector, optimizer = projector_for(model, scope="up|down", history=2), adamw(model)
    bad = math.nan * model.place.sum()
    projector.update(tiny.nll(model, RETAIN) + (bad if place == "retain" else 0))
    (-tiny.nll(model, FORGET) + (bad if place == "forget" else 0)).backward()
    before = tiny.values(model)
    assert "skipped_window" in projector.project_(retain_weight=1.0).flags
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with projector.guard(optimizer):
        optimizer.step()
    assert torch.equal(tiny.values(model), before)
    projector.end_window()
    assert len(projector.window.history) == (place == "forget")
    assert "skipped_window" not in window(model, projector).flags


def test_stage_a_with_a_finite_step_corrects_nothing(model) -> None:
    twin = copy.deepcopy(model)
    for each, options in ((model, {"finite_step": FiniteStep(lambda: 0.0)}), (twin, {})):
        projector = projector_for(each, stage="A")
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, weight_decay=0.1)
        window(each, projector)
        with projector.guard(optimizer, **options):
            optimizer.step()
        assert projector.last.correction is None
    assert torch.equal(tiny.values(model), tiny.values(twin))


def test_the_predicted_change_is_that_of_the_shortened_step(model) -> None:
    projector, optimizer = projector_for(model, stage="B"), adamw(model)
    losses = iter([0.0, 1.0, 0.0])  # too high at the whole step, low enough at half of it
    r = tiny.gradient(model, tiny.nll(model, RETAIN))
    projector.update(tiny.nll(model, RETAIN))
    tiny.nll(model, RETAIN).backward()
    projector.project_()
    before = tiny.values(model)
    with projector.guard(optimizer, FiniteStep(lambda: next(losses))):
        optimizer.step()
    assert projector.last.step_scale == 0.5
    moved = float(r @ (tiny.values(model) - before))
    assert moved < 0
    assert projector.last.predicted == pytest.approx(moved, rel=1e-9)


def test_a_correction_follows_parameters_whose_storage_was_replaced(model) -> None:
    projector, optimizer = projector_for(model, delta_mode="hard"), adamw(model)
    for _ in range(2):
        for parameter in model.parameters():  # as .to(), .half() and merging adapters do
            parameter.data = parameter.data.clone()
        r = tiny.gradient(model, tiny.nll(model, RETAIN))
        before = tiny.values(model)
        window(model, projector)
        with projector.guard(optimizer):
            optimizer.step()
        optimizer.zero_grad()
        projector.end_window()
        assert "no_step" not in projector.last.flags
        assert abs(tiny.cosine(r, tiny.values(model) - before)) < 1e-9


def test_a_loss_scale_does_not_make_rows_look_tiny(model) -> None:
    """Rows are unscaled and .grad is not: norms of both decide what counts as noise."""
    found = []
    for scale in (1.0, 2.0**24):
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        projector = projector_for(model, scaler=scaler, stage="A")
        projector.update(1e-3 * tiny.nll(model, RETAIN))
        scaler.scale(-tiny.nll(model, FORGET)).backward()
        stats = projector.project_()
        assert stats.flags == ()
        found.append(tiny.flat(p.grad / scale for p in model.parameters()))
    torch.testing.assert_close(found[0], found[1])


def test_a_margin_does_not_depend_on_the_loss_scale(model) -> None:
    found = []
    for kind in ("extra", "batch"):
        for scale in (1.0, 2.0**10):
            model.zero_grad()
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            projector = projector_for(
                model, scaler=scaler, stage="A", mode="cone", margin=0.5, rows=(kind,)
            )
            if kind == "extra":
                projector.add_rows([tiny.nll(model, RETAIN), tiny.nll(model, tiny.batch(9))])
            projector.update(tiny.nll(model, RETAIN))
            scaler.scale(-tiny.nll(model, FORGET)).backward()
            projector.project_()
            found.append(tiny.flat(p.grad / scale for p in model.parameters()))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    assert (found[0] - found[2]).norm() > 1e-3


def test_bank_and_own_rows_are_computed_from_scaled_losses_and_unscaled(model) -> None:
    """A small loss underflows in half precision unless it is scaled, for every kind of row."""
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(float(gradient))
            return gradient

    projector = projector_for(model, stage="A", refresh_every=1)
    projector.set_bank([lambda: [(Seen.apply(tiny.nll(model, tiny.batch(20))), 2.0)]])
    projector.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # as a trainer does, later
    for _ in range(2):
        projector.add_rows([Seen.apply(tiny.nll(model, tiny.batch(21)))])
        window(model, projector, projector.scaler)
        for seed, slot in ((20, projector.window.bank[0]), (21, projector.window.extra[0])):
            row = tiny.flat(projector.window.rows.views(slot))
            expected = tiny.gradient(model, tiny.nll(model, tiny.batch(seed)))
            torch.testing.assert_close(row, expected)
        projector.end_window()
        with torch.no_grad():
            model.embed.weight.mul_(1.5)
    assert seen == [64.0] * 4


class _Hookless:
    """Stands for an optimizer that never calls step hooks."""

    def __init__(self, skipped: bool) -> None:
        self.step_was_skipped = skipped


def test_a_step_that_called_no_hook_is_found_at_once(model) -> None:
    projector = projector_for(model, stage="B")
    callback = RetainProjectionCallback(projector, lambda: [(tiny.nll(model, RETAIN), 1.0)])
    callback.protection.begin(adamw(model), 0)
    (-tiny.nll(model, FORGET)).backward()
    callback.protection.collect()
    callback.on_optimizer_step(None, None, None, optimizer=_Hookless(skipped=True))
    assert not projector.stepped
    with pytest.raises(VerificationError, match="hook"):
        callback.on_optimizer_step(None, None, None, optimizer=_Hookless(skipped=False))


def test_the_steps_of_a_resumed_training_are_counted_from_there(model) -> None:
    projector, optimizer = projector_for(model, stage="B"), adamw(model)
    callback = RetainProjectionCallback(projector, lambda: [(tiny.nll(model, RETAIN), 1.0)])
    callback.protection.begin(optimizer, 5)
    (-tiny.nll(model, FORGET)).backward()
    callback.protection.collect()
    optimizer.step()
    callback.protection.end(6)
    with pytest.raises(VerificationError, match="not every"):
        callback.protection.end(7)


def test_a_removed_attachment_no_longer_ends_windows(model) -> None:
    projector = projector_for(model)
    handle = projector.attach(adamw(model))
    assert projector.attached
    window(model, projector)
    projector.update(tiny.nll(model, RETAIN))  # an attached projector ends the window itself
    projector.end_window()
    handle.remove()
    assert not projector.attached
    window(model, projector)
    with pytest.raises(RecipeError, match="projected already"):
        projector.update(tiny.nll(model, RETAIN))


def test_a_spoilt_row_is_left_out_without_a_trace(model) -> None:
    model.other = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    projector = projector_for(model, stage="A")
    bad = math.nan * (tiny.nll(model, tiny.batch(9)) + model.other.sum())
    projector.add_rows([bad, tiny.nll(model, tiny.batch(8))])
    stats = window(model, projector)
    assert stats.flags == ("dropped_rows",)
    assert stats.k == 2
    assert len(projector.window.extra) == 1
    assert model.other.grad is None  # an optimizer would decay what has a gradient of zeros
    model.other.grad = torch.zeros_like(model.other)
    found = tiny.flat(p.grad for p in model.parameters())
    for seed in (1, 8):
        assert (
            abs(tiny.cosine(found, tiny.gradient(model, tiny.nll(model, tiny.batch(seed))))) < 1e-9
        )


def test_the_smoothed_row_outlives_a_spoilt_window(model) -> None:
    projector = projector_for(model, row_ema=0.8, rows=("batch",), stage="A", granularity="global")
    rows = []
    for factor in (1.0, math.nan, 1.0):
        model.zero_grad()
        seed = 30 + len(rows)
        rows.append(tiny.gradient(model, tiny.nll(model, tiny.batch(seed))))
        projector.update(factor * tiny.nll(model, tiny.batch(seed)))
        (-tiny.nll(model, FORGET)).backward()
        projector.project_()
        projector.end_window()
    smooth = 0.8 * rows[0] + 0.2 * rows[2]
    found = tiny.flat(p.grad for p in model.parameters())
    assert abs(tiny.cosine(found, smooth)) < 1e-9
    assert abs(tiny.cosine(found, rows[2])) > 1e-3


def test_a_spoilt_row_of_a_window_that_was_given_up_leaves_the_history(model) -> None:
    projector = projector_for(model, history=2, stage="A")
    projector.update(math.nan * tiny.nll(model, RETAIN))
    projector.end_window()
    stats = window(model, projector)
    assert stats.flags == ("dropped_rows",)
    assert stats.k == 1
    projector.end_window()
    assert len(projector.window.history) == 1
    assert projector.window.batch not in projector.window.history


def test_what_is_left_of_a_nearly_collinear_gradient_is_not_used(model) -> None:
    projector = projector_for(model, stage="A", granularity="global")
    projector.update(tiny.nll(model, RETAIN))
    (-2 * tiny.nll(model, RETAIN) - 1e-4 * tiny.nll(model, FORGET)).backward()
    stats = projector.project_(retain_weight=0.5)
    assert 1e-6 < stats.kept < 1e-3
    r = tiny.gradient(model, tiny.nll(model, RETAIN))
    found = tiny.flat(p.grad for p in model.parameters())
    torch.testing.assert_close(found, 0.5 * r, rtol=0, atol=1e-9)
    assert stats.slope == pytest.approx(0.5 * float(r @ r), rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*not protected")
def test_retain_gradients_out_of_scope_have_the_same_weight(model) -> None:
    found = []
    for scope in (None, "up|down"):
        model.zero_grad()
        projector = projector_for(model, scope=scope, mode="off", stage="A")
        tiny.nll(model, RETAIN).backward()
        projector.update_from_grads(0.25)
        (-tiny.nll(model, FORGET)).backward()
        projector.project_(retain_weight=2.0)
        found.append(tiny.flat(p.grad for p in model.parameters()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("stage", ["A", "B"])
def test_a_second_pass_removes_what_rounding_left(stage) -> None:
    """Nearly all of the vector is removed, so that the rounding of one pass is large beside it."""
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(20_000, generator=generator)

    w = torch.nn.Parameter(torch.zeros(20_000))
    common = normal()
    rows, f = [common, common + normal()], common + 1e-2 * normal()
    projector = RetainProjector([w], stage=stage, rows=("extra",), delta_mode="hard")
    projector.add_rows([(r * w).sum() for r in rows])
    (f * w).sum().backward()
    projector.project_()
    with projector.guard(torch.optim.SGD([w], lr=1e-3)) if stage == "B" else nullcontext():
        if stage == "B":
            w.detach().sub_(1e-3 * w.grad)
    left = (w.grad if stage == "A" else w.detach()).double()
    assert left.norm() > 1e-6 * f.norm()
    assert max(abs(tiny.cosine(left, r.double())) for r in rows) < 1e-7


def test_the_restore_rule_counts_micro_batches_by_their_weights(model) -> None:
    projector, optimizer = projector_for(model, restore=0.5), adamw(model)
    for seed, weight, rise in ((3, 0.25, 0.004), (4, 0.75, 0.008)):
        loss = tiny.nll(model, tiny.batch(seed))
        projector.update(loss, weight, start_loss=loss.item() - rise)
    (-tiny.nll(model, FORGET)).backward()
    projector.project_()
    with projector.guard(optimizer):
        optimizer.step()
    assert projector.last.restoring == pytest.approx(0.5 * (0.25 * 0.004 + 0.75 * 0.008), rel=1e-6)


def test_the_slope_does_not_depend_on_the_loss_scale_or_the_stage(model) -> None:
    r = tiny.gradient(model, tiny.nll(model, RETAIN))
    g = tiny.gradient(model, -tiny.nll(model, FORGET))
    for scale in (1.0, 2.0**10):
        for stage, forget in (("A", 0.0), ("B", float(r @ g))):
            model.zero_grad()
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            projector = projector_for(model, scaler=scaler, stage=stage)
            stats = window(model, projector, scaler, retain_weight=0.5)
            assert stats.slope == pytest.approx(forget + 0.5 * float(r @ r), rel=1e-9)
