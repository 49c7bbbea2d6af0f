"""Stage B: realised optimizer steps, with momentum, decay and clipping, against plain gradients."""

from __future__ import annotations

import copy

import pytest
import tiny_projection as tiny
import torch
from torch import nn

from orthomerge.errors import NumericalError, RecipeError
from orthomerge.unlearning import RetainProjector
from orthomerge.unlearning.projection import FiniteStep
from orthomerge.unlearning.projection.metrics import adam_metric

RETAIN, FORGET = tiny.batch(1), tiny.batch(2)


@pytest.fixture
def model():
    return tiny.TinyTransformer()


def adamw(model, **changes):
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1} | changes
    return torch.optim.AdamW(model.parameters(), **settings)


def step(model, projector, optimizer, seed=0, alpha=0.0, start=None, attached=False, **options):
    """One window; returns the window's retain gradient and the realised update, in float64."""
    retain = tiny.batch(100 + seed)
    r = tiny.gradient(model, tiny.nll(model, retain))
    projector.update(tiny.nll(model, retain), start_loss=start)
    (-tiny.nll(model, FORGET)).backward()
    projector.project_(retain_weight=alpha)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    before = tiny.values(model)
    if attached:
        optimizer.step()
    else:
        with projector.guard(optimizer, **options):
            optimizer.step()
    optimizer.zero_grad()
    if not attached:
        projector.end_window()
    return r, tiny.values(model) - before


def worst(model, projector, optimizer, steps=8, **options):
    """Largest |cosine| and largest signed cosine of retain gradient and realised update."""
    found = [
        tiny.cosine(*step(model, projector, optimizer, seed, **options)) for seed in range(steps)
    ]
    return max(map(abs, found)), max(found)


@pytest.mark.parametrize("granularity", ["per-tensor", "global"])
@pytest.mark.parametrize("stage", ["B", "AB"])
def test_hard_correction_of_adamw_with_momentum_decay_and_clipping(
    model, stage, granularity
) -> None:
    projector = RetainProjector(model, stage=stage, delta_mode="hard", granularity=granularity)
    assert worst(model, projector, adamw(model))[0] <= 1e-6
    assert projector.corrections == projector.projections == 8
    plain = RetainProjector(tiny_model := tiny.TinyTransformer(), stage="A", allow_approximate=True)
    with pytest.warns(UserWarning, match="approximately"):
        assert worst(tiny_model, plain, adamw(tiny_model))[0] > 1e-2  # what B has to correct


@pytest.mark.parametrize("metric", ["euclid", "adam", "fisher"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_cone_correction_in_every_metric(model, metric, amsgrad) -> None:
    fisher = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    projector = RetainProjector(model, delta_metric=metric, fisher=fisher, history=3)
    absolute, signed = worst(model, projector, adamw(model, amsgrad=amsgrad))
    assert signed <= 1e-6
    assert absolute <= 1.0
    assert projector.last.cos_after <= 1e-6
    # Per tensor, a LayerNorm's sixteen float32 weights near 1 cannot hold finer updates.
    assert projector.last.residual_after <= 5e-5


def test_every_row_is_protected_from_the_realised_update(model) -> None:
    projector = RetainProjector(model, history=3, granularity="global", delta_mode="hard")
    optimizer, rows = adamw(model), []
    for seed in range(6):
        r, delta = step(model, projector, optimizer, seed)
        rows.append(r)
        assert max(abs(tiny.cosine(x, delta)) for x in rows[-4:]) <= 1e-6
    assert abs(tiny.cosine(rows[0], delta)) > 1e-5


def test_a_safe_update_stays_as_it_is_bit_for_bit(model) -> None:
    twin = copy.deepcopy(model)
    projector = RetainProjector(model, stage="B")
    optimizer, other = adamw(model), adamw(twin)
    for seed in range(3):  # descent on the retain loss itself
        retain = tiny.batch(100 + seed)
        projector.update(tiny.nll(model, retain))
        tiny.nll(model, retain).backward()
        projector.project_()
        with projector.guard(optimizer):
            optimizer.step()
        optimizer.zero_grad()
        projector.end_window()
        tiny.nll(twin, retain).backward()
        other.step()
        other.zero_grad()
        if projector.last.correction == 0:
            assert torch.equal(tiny.values(model), tiny.values(twin))
        if seed == 0:
            assert projector.last.correction == 0
            assert projector.last.cos_after < -0.1


def test_stage_b_alone_leaves_gradients_alone(model) -> None:
    projector = RetainProjector(model, stage="B")
    projector.update(tiny.nll(model, RETAIN))
    (-tiny.nll(model, FORGET)).backward()
    held = [p.grad.clone() for p in model.parameters()]
    projector.project_()
    assert all(torch.equal(a, p.grad) for a, p in zip(held, model.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["cone", "hard"])
def test_restore_rule_asks_for_the_decrease_and_shares_it_by_squared_gradient(model, mode) -> None:
    projector = RetainProjector(model, delta_mode=mode, restore=0.25)
    optimizer = adamw(model)
    for seed in range(3):
        now = tiny.nll(model, tiny.batch(100 + seed)).item()
        r, delta = step(model, projector, optimizer, seed, start=now - 0.004)
        wanted = 0.25 * 0.004
        assert projector.last.restoring == pytest.approx(wanted, rel=1e-3)
        assert float(r @ delta) <= -wanted * (1 - 1e-3)
        parts = [p.numel() for p in model.parameters()]
        for x, d in zip(r.split(parts), delta.split(parts), strict=True):
            share = wanted * float(x @ x / (r @ r))
            assert float(x @ d) <= -share * (1 - 1e-2) + 1e-9 * float(x.norm())
            if mode == "hard":
                assert float(x @ d) == pytest.approx(-share, rel=1e-2, abs=1e-9 * float(x.norm()))
        assert projector.last.predicted == pytest.approx(float(r @ delta), rel=1e-4)
    below = tiny.nll(model, tiny.batch(100)).item() + 1.0
    step(model, projector, optimizer, 0, start=below)
    assert projector.last.restoring == 0.0


def test_predicted_change_and_ratio_of_correction(model) -> None:
    model.double()
    projector = RetainProjector(model, delta_mode="hard", row_dtype=torch.float64, stage="B")
    twin, optimizer = copy.deepcopy(model), adamw(model)
    r, delta = step(model, projector, optimizer)
    (-tiny.nll(twin, FORGET)).backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    start = tiny.values(twin)
    adamw(twin).step()
    proposed = tiny.values(twin) - start
    assert projector.last.correction == pytest.approx(
        float((delta - proposed).norm() / proposed.norm()), rel=1e-6
    )
    assert projector.last.cos_before == pytest.approx(tiny.cosine(r, proposed), abs=1e-9)
    assert abs(tiny.cosine(r, delta)) < 1e-12


def test_the_adam_metric_is_floored_and_reads_the_state_after_the_step(model) -> None:
    optimizer = adamw(model, betas=(0.0, 0.9), amsgrad=True)
    parameters = list(model.parameters())
    assert adam_metric(optimizer, parameters) is None
    model.embed.weight.requires_grad_(True)
    tiny.nll(model, RETAIN).backward()
    optimizer.step()
    for p, scale in zip(parameters, adam_metric(optimizer, parameters), strict=True):
        v = optimizer.state[p]["max_exp_avg_sq"].double() / (1 - 0.9)
        root = v.sqrt().reshape(-1)
        expected = 1 / (root.clamp(min=1e-2 * root.square().mean().sqrt()) + 1e-8)
        torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)
        assert scale.max() / scale.min() < 1e5
    bad = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    bad.step()
    with pytest.raises(RecipeError, match="second moments"):
        adam_metric(bad, parameters)


def test_cold_metric_is_flagged_and_then_used(model) -> None:
    optimizer = adamw(model, betas=(0.0, 0.99))
    projector = RetainProjector(model, metric="adam", delta_metric="adam", optimizer=optimizer)
    step(model, projector, optimizer)
    assert "cold_metric" in projector.last.flags
    r, delta = step(model, projector, optimizer, 1)
    assert "cold_metric" not in projector.last.flags
    assert tiny.cosine(r, delta) <= 1e-6


def test_attached_hooks_protect_and_windows_end_by_themselves(model) -> None:
    projector, optimizer = RetainProjector(model, history=2), adamw(model)
    handle = projector.attach(optimizer)
    assert worst(model, projector, optimizer, attached=True)[1] <= 1e-6
    assert projector.corrections == projector.projections == 8
    with pytest.raises(RecipeError, match="without a projection"):
        optimizer.step()
    handle.remove()
    optimizer.step()
    assert projector.corrections == 8


def test_a_grad_scaler_that_skips_a_step_skips_the_correction(model) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    projector, optimizer = RetainProjector(model, scaler=scaler, restore=0.5), adamw(model)
    projector.attach(optimizer)
    reference_model = tiny.TinyTransformer()
    reference = RetainProjector(reference_model, restore=0.5)
    other = adamw(reference_model)
    reference.attach(other)
    for number, spoilt in enumerate((False, True, False, False)):
        before = tiny.values(model)
        start = tiny.nll(model, RETAIN).item() - 0.003
        projector.update(tiny.nll(model, RETAIN), start_loss=start)
        factor = float("inf") if spoilt else 1.0
        scaler.scale(-factor * tiny.nll(model, FORGET)).backward()
        projector.project_(retain_weight=0.5)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if spoilt:
            assert torch.equal(tiny.values(model), before)
            assert "skipped_window" in projector.last.flags
            continue
        reference.update(tiny.nll(reference_model, RETAIN), start_loss=start)
        (-tiny.nll(reference_model, FORGET)).backward()
        reference.project_(retain_weight=0.5)
        nn.utils.clip_grad_norm_(reference_model.parameters(), 1.0)
        other.step()
        other.zero_grad()
        difference = tiny.values(model) - tiny.values(reference_model)
        assert difference.abs().max() < 2e-6
        assert projector.corrections == reference.corrections == number + (number < 1) * 1
        assert projector.last.slope == pytest.approx(reference.last.slope, rel=1e-3)


def test_a_retain_overflow_under_a_scaler_skips_the_step(model) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    projector, optimizer = RetainProjector(model, scaler=scaler), adamw(model)
    projector.attach(optimizer)
    before = tiny.values(model)
    projector.update(tiny.nll(model, RETAIN) * float("inf"))
    scaler.scale(-tiny.nll(model, FORGET)).backward()
    projector.project_()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(tiny.values(model), before)
    assert scaler.get_scale() == 2.0


def test_half_precision_parameters_are_measured_as_stored() -> None:
    model = tiny.TinyTransformer().bfloat16()
    projector = RetainProjector(model, delta_mode="hard")
    r, delta = step(model, projector, adamw(model, lr=1e-3))
    stats = projector.last
    assert stats.cos_after == pytest.approx(tiny.cosine(r, delta), abs=1e-3)
    assert abs(stats.cos_after) < abs(stats.cos_before)
    assert 0 < stats.quantised_zero < 1
    assert step(model, projector, adamw(model, lr=1e-6))[1].norm() < 1e-2
    assert projector.last.quantised_zero is None or projector.last.quantised_zero > 0.5


def test_momentum_without_stage_b_is_refused(model) -> None:
    projector = RetainProjector(model, stage="A")
    for optimizer in (adamw(model), torch.optim.SGD(model.parameters(), lr=1, momentum=0.9)):
        with pytest.raises(RecipeError, match="momentum"):
            projector.attach(optimizer)
        with pytest.raises(RecipeError, match="momentum"):
            step(model, projector, optimizer)
        projector.end_window()
    step(model, projector, torch.optim.SGD(model.parameters(), lr=0.1))
    step(model, projector, adamw(model, betas=(0.0, 0.99)))
    assert projector.corrections == 0


def test_hard_correction_with_a_retain_term_warns_and_cancels_it(model) -> None:
    projector = RetainProjector(model, delta_mode="hard")
    with pytest.warns(UserWarning, match="cancels"):
        r, delta = step(model, projector, adamw(model), alpha=2.0)
    assert abs(tiny.cosine(r, delta)) <= 1e-6
    cone = RetainProjector(model)
    r, delta = step(model, cone, adamw(model), alpha=2.0)
    assert tiny.cosine(r, delta) < -0.01


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_an_update_that_is_not_finite_is_undone(model, policy) -> None:
    projector = RetainProjector(model, nan_policy=policy)
    before = tiny.values(model)
    optimizer = adamw(model, lr=float("inf"))
    if policy == "raise":
        with pytest.raises(NumericalError, match="update is not finite"):
            step(model, projector, optimizer)
        return
    step(model, projector, optimizer)
    assert "nonfinite_update" in projector.last.flags
    assert torch.equal(tiny.values(model), before)


def test_a_skipped_window_moves_nothing_even_where_momentum_would(model) -> None:
    projector, optimizer = RetainProjector(model, stage="AB"), adamw(model)
    step(model, projector, optimizer)
    before = tiny.values(model)
    projector.update(tiny.nll(model, RETAIN) * float("nan"))
    (-tiny.nll(model, FORGET)).backward()
    projector.project_()
    with projector.guard(optimizer):
        optimizer.step()
    assert torch.equal(tiny.values(model), before)


def test_finite_step_filter_keeps_the_measured_loss_in_budget(model) -> None:
    projector, optimizer = RetainProjector(model), adamw(model, lr=0.2)
    for budget, expected in ((1e9, {1.0}), (0.02, {0.5, 0.25, 0.125, 0.0}), (-1e9, {0.0})):
        start = tiny.nll(model, RETAIN).item()
        filter_ = FiniteStep(lambda: tiny.nll(model, RETAIN), budget=budget)
        step(model, projector, optimizer, finite_step=filter_)
        assert projector.last.step_scale in expected
        assert ("shortened" in projector.last.flags) == (projector.last.step_scale < 1)
        assert budget > 1 or tiny.nll(model, RETAIN).item() - start <= max(budget, 0) + 1e-6


def ruled(seed: int) -> torch.Tensor:
    """Rows that share a rule (every second token follows from the one before) and are else free."""
    tokens = tiny.batch(seed, rows=8, length=10)
    tokens[:, 1::2] = (3 * tokens[:, 0::2] + 1) % 17
    return tokens


def test_protection_halves_the_damage_at_equal_forgetting() -> None:
    """A whole small run on entangled sets: the retain loss at the same forget loss."""
    retain, forget = ruled(1), ruled(2)
    learnt = tiny.TinyTransformer(seed=1)
    learner = torch.optim.Adam(learnt.parameters(), lr=1e-2)
    for _ in range(100):
        (tiny.nll(learnt, retain) + tiny.nll(learnt, forget)).backward()
        learner.step()
        learner.zero_grad()
    first, goal = tiny.nll(learnt, retain).item(), tiny.nll(learnt, forget).item() + 0.5
    rises = {}
    for protected in (False, True):
        model = copy.deepcopy(learnt)
        optimizer = adamw(model, weight_decay=0.01)
        projector = RetainProjector(model)
        for _ in range(150):
            loss = tiny.nll(model, forget)
            if loss.item() >= goal:
                break
            (-loss).backward()
            if protected:
                projector.update(tiny.nll(model, retain), start_loss=first)
                projector.project_()
                with projector.guard(optimizer):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        assert tiny.nll(model, forget).item() >= goal
        rises[protected] = tiny.nll(model, retain).item() - first
    assert rises[False] > 0.05
    assert rises[True] < rises[False] / 2
