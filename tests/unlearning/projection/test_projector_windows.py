"""Stage A in a training loop: windows, rows, banks, histories, and everything that is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import tiny_projection as tiny
import torch
from torch import nn

from orthomerge.errors import NumericalError, ProblemsError, RecipeError, UnknownNameError
from orthomerge.unlearning import RetainProjector

RETAIN, FORGET = tiny.batch(1), tiny.batch(2)


@pytest.fixture
def model():
    return tiny.TinyTransformer().double()


def projector_for(model, **settings):
    settings = {"stage": "A", "row_dtype": torch.float64, "min_kept": 0.0} | settings
    return RetainProjector(model, **settings)


def forget_loss(model):
    return -tiny.nll(model, FORGET)


def grads(model):
    return tiny.flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())


def window(model, projector, **arguments):
    projector.update(tiny.nll(model, RETAIN))
    forget_loss(model).backward()
    return projector.project_(**arguments)


@pytest.mark.parametrize("granularity", ["per-tensor", "per-layer", "global", ("norm", "up|down")])
def test_projected_gradient_is_orthogonal_and_the_forget_gradient_untouched(
    model, granularity
) -> None:
    g, r = tiny.gradient(model, forget_loss(model)), tiny.gradient(model, tiny.nll(model, RETAIN))
    projector = projector_for(model, granularity=granularity)
    forget_loss(model).backward()
    projector.update(tiny.nll(model, RETAIN))
    assert torch.equal(grads(model), g)
    stats = projector.project_()
    assert abs(tiny.cosine(grads(model), r)) < 1e-12
    assert abs(tiny.cosine(g, r)) > 0.05
    assert stats.cos_forget_retain == pytest.approx(tiny.cosine(g, r), abs=1e-12)
    assert stats.kept == pytest.approx(float(grads(model).norm() / g.norm()), abs=1e-12)
    assert stats.slope == pytest.approx(0.0, abs=1e-10)
    if granularity == "global":
        torch.testing.assert_close(grads(model), g - (g @ r) / (r @ r) * r)
    else:
        expected = g - (g @ r) / (r @ r) * r
        assert (grads(model) - expected).norm() > 1e-3 * g.norm()
    json.dumps(stats.as_dict(), allow_nan=False)


def test_global_history_rows_match_a_qr_projection(model) -> None:
    projector = projector_for(model, granularity="global", history=3)
    rows = []
    for seed in range(6):
        rows.append(tiny.gradient(model, tiny.nll(model, tiny.batch(10 + seed))))
        projector.update(tiny.nll(model, tiny.batch(10 + seed)))
        forget_loss(model).backward()
        g = grads(model)
        stats = projector.project_()
        Q, _ = torch.linalg.qr(torch.stack(rows[-4:], 1))
        torch.testing.assert_close(grads(model), g - Q @ (Q.T @ g), rtol=0, atol=1e-10)
        assert stats.k == min(seed + 1, 4)
        model.zero_grad()
        projector.end_window()


@pytest.mark.parametrize("weighting", ["equal", "tokens"])
def test_accumulated_micro_batches_are_one_batch(model, weighting) -> None:
    sizes = (4, 4, 4, 4) if weighting == "equal" else (7, 2, 4, 3)
    retain, forget = tiny.batch(5, rows=16), tiny.batch(6, rows=16)
    results = []
    for parts in ((16,), sizes):
        model.zero_grad()
        projector = projector_for(model)
        for r, f in zip(retain.split(parts), forget.split(parts), strict=True):
            projector.update(tiny.nll(model, r), weight=len(r) / 16)
            (-tiny.nll(model, f) * len(f) / 16).backward()
        projector.project_(retain_weight=0.5, forget_scale=2.0)
        results.append(grads(model))
    assert (results[0] - results[1]).norm() < 1e-10 * results[0].norm()


def test_joint_direction_predicts_the_change_of_the_retain_loss(model) -> None:
    stats = window(model, projector_for(model), retain_weight=0.7, forget_scale=1.3)
    r = tiny.gradient(model, tiny.nll(model, RETAIN))
    assert stats.slope == pytest.approx(0.7 * float(r @ r), rel=1e-9)
    before, eta = tiny.nll(model, RETAIN).item(), 1e-6
    with torch.no_grad():
        for p in model.parameters():
            p -= eta * p.grad
    change = tiny.nll(model, RETAIN).item() - before
    assert change == pytest.approx(-eta * stats.slope, rel=1e-3)
    assert change < 0


@pytest.mark.parametrize(
    ("granularity", "metric"),
    [("global", "euclid"), ("per-tensor", "euclid"), ("global", "adam"), ("global", "mismatch")],
)
def test_slopes_of_the_retain_loss(model, granularity, metric) -> None:
    """First order without projection, second order with; the wrong metric is caught."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for seed in (3, 4, 5):  # a settled second moment
        tiny.nll(model, tiny.batch(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    P = None
    if metric != "euclid":
        # Compare in the optimizer's own metric: what the projector uses is what moves here.
        from orthomerge.unlearning.projection.metrics import adam_metric

        P = torch.cat(adam_metric(optimizer, list(model.parameters()))).double()
        P /= P.mean()
    steps = 10 ** torch.linspace(-3.5, -1.5, 9, dtype=torch.float64)
    start = copy.deepcopy(model.state_dict())
    name = "adam" if metric == "adam" else "euclid"
    slopes = {}
    for kind, mode in (("raw", "off"), ("projected", "hard")):
        model.load_state_dict(start)
        model.zero_grad()
        projector = projector_for(
            model, mode=mode, granularity=granularity, metric=name, optimizer=optimizer
        )
        projector.update(tiny.nll(model, RETAIN))
        # The forget loss shares most of the retain gradient, as entangled sets do.
        (-tiny.nll(model, FORGET) - tiny.nll(model, RETAIN)).backward()
        projector.project_()
        direction = grads(model) if P is None else P * grads(model)
        direction = direction / direction.norm()
        first, changes = tiny.nll(model, RETAIN).item(), []
        for step in steps:
            model.load_state_dict(start)
            move(model, -step * direction)
            changes.append(abs(tiny.nll(model, RETAIN).item() - first))
        slopes[kind] = fit(steps.log(), torch.tensor(changes).double().log())
    assert slopes["raw"] <= 1.1
    if metric == "mismatch":
        assert slopes["projected"] < 1.9
    else:
        assert slopes["projected"] >= 1.95


def move(model, delta):
    with torch.no_grad():
        for p, d in zip(
            model.parameters(), delta.split([p.numel() for p in model.parameters()]), strict=True
        ):
            p += d.reshape(p.shape)


def fit(x, y):
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x))


def test_cone_leaves_an_agreeing_gradient_and_projects_a_conflicting_one(model) -> None:
    for sign, changed in ((1, False), (-1, True)):
        model.zero_grad()
        projector = projector_for(model, mode="conflict", rows=("batch",), granularity="global")
        projector.update(tiny.nll(model, RETAIN))
        (sign * tiny.nll(model, RETAIN) + 0.1 * tiny.nll(model, FORGET)).backward()
        before = grads(model)
        projector.project_()
        assert torch.equal(before, grads(model)) != changed
        r = tiny.gradient(model, tiny.nll(model, RETAIN))
        assert tiny.cosine(grads(model), r) > -1e-9


def test_mode_off_is_bit_identical(model) -> None:
    projector = projector_for(model, mode="off")
    projector.update(tiny.nll(model, RETAIN))
    forget_loss(model).backward()
    before = grads(model)
    assert projector.project_().kept is None
    assert torch.equal(grads(model), before)


def test_strength_removes_a_share(model) -> None:
    found = {}
    for strength in (0.0, 0.25, 1.0):
        model.zero_grad()
        window(model, projector_for(model, strength=strength))
        found[strength] = grads(model)
    torch.testing.assert_close(found[0.25], 0.75 * found[0.0] + 0.25 * found[1.0])


def test_clipping_by_the_global_norm_keeps_the_residual(model) -> None:
    model.float()
    projector = projector_for(model, row_dtype=torch.float32)
    window(model, projector)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert grads(model).norm() < 1.01e-3
    assert abs(tiny.cosine(grads(model), tiny.gradient(model, tiny.nll(model, RETAIN)))) < 1e-6
    assert projector.measure().residual < 1e-6


def test_zero_retain_gradient_changes_nothing_and_is_flagged(model) -> None:
    projector = projector_for(model)
    projector.update(0.0 * tiny.nll(model, RETAIN))
    forget_loss(model).backward()
    before = grads(model)
    stats = projector.project_()
    assert torch.equal(before, grads(model))
    assert "zero_row" in stats.flags
    assert stats.k == 0


def test_divergence_to_the_starting_model_is_no_row(model) -> None:
    """Its gradient at the start is rounding noise; normalised, it would be a random direction."""
    reference = copy.deepcopy(model)
    log_p = model(RETAIN).log_softmax(-1)
    log_q = reference(RETAIN).log_softmax(-1).detach()
    projector = projector_for(model)
    projector.update((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    forget_loss(model).backward()
    before = grads(model)
    noise = sum(float(v.norm()) for v in projector.window.rows.flats(projector.window.batch))
    assert 0 < noise < 1e-12
    assert "tiny_row" in projector.project_().flags
    assert torch.equal(before, grads(model))


def test_collinear_gradient_gives_a_zero_forget_step(model) -> None:
    projector = projector_for(model, min_kept=1e-3)
    projector.update(tiny.nll(model, RETAIN))
    (-2 * tiny.nll(model, RETAIN)).backward()
    stats = projector.project_(retain_weight=0.5)
    r = tiny.gradient(model, tiny.nll(model, RETAIN))
    assert "collinear" in stats.flags
    torch.testing.assert_close(grads(model), 0.5 * r)
    assert stats.slope == pytest.approx(0.5 * float(r @ r))


def test_frozen_and_unused_parameters_count_as_zero(model) -> None:
    model.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.place.requires_grad_(False)
    projector = projector_for(model, granularity="global")
    projector.update(tiny.nll(model, RETAIN) + model.other.sum())
    (forget_loss(model) + model.spare.sum()).backward()
    projector.project_(retain_weight=1.0)
    assert torch.equal(model.spare.grad, torch.ones(3).double())
    assert model.other.grad is not None
    assert model.place.grad is None
    assert "place" not in projector.scope.names
    r = tiny.gradient(model, tiny.nll(model, RETAIN) + model.other.sum())
    forward = tiny.flat([p.grad for p in model.parameters() if p.requires_grad])
    assert float(forward @ r) == pytest.approx(float(r @ r), rel=1e-9)


def test_tied_weights_count_once(model) -> None:
    projector = projector_for(model)
    assert projector.scope.names.count("embed.weight") == 1
    assert "head.weight" not in projector.scope.names
    named = projector_for([model.embed.weight, model.head.weight, model.place])
    assert len(named.scope.parameters) == 2


def test_unselected_parameters_keep_forget_and_retain_parts(model) -> None:
    projector = projector_for(model, scope=r"up|down")
    assert all("up" in n or "down" in n for n in projector.scope.names)
    g = tiny.gradient(model, forget_loss(model))
    r = tiny.gradient(model, tiny.nll(model, RETAIN))
    with pytest.warns(UserWarning, match="not protected"):
        stats = window(model, projector, retain_weight=0.5, forget_scale=2.0)
    selected = tiny.flat(
        torch.full_like(p, "up" in n or "down" in n) for n, p in model.named_parameters()
    ).bool()
    torch.testing.assert_close(grads(model)[~selected], (2 * g + 0.5 * r)[~selected])
    rest = float(r[~selected] @ r[~selected] / (r @ r))
    assert stats.outside == pytest.approx(rest, rel=1e-9)
    left = grads(model)[selected] - 0.5 * r[selected]
    assert abs(tiny.cosine(left, r[selected])) < 1e-12


def test_bank_rows_are_weighted_means_refreshed_in_time(model) -> None:
    calls = []

    def group(seed):
        def losses():
            calls.append(seed)
            yield tiny.nll(model, tiny.batch(seed, rows=3)), 3.0
            yield tiny.nll(model, tiny.batch(seed + 50, rows=1)), 1.0

        return losses

    projector = projector_for(model, refresh_every=3)
    projector.set_bank([group(20), group(21)])
    for number in range(7):
        forget_loss(model).backward()
        projector.update(tiny.nll(model, RETAIN))
        held = grads(model)
        stats = projector.project_()
        assert stats.refreshed == (number % 3 == 0)
        assert stats.k == 3
        assert not torch.equal(held, grads(model))
        for seed in (20, 21):
            loss = 0.75 * tiny.nll(model, tiny.batch(seed, rows=3))
            loss = loss + 0.25 * tiny.nll(model, tiny.batch(seed + 50, rows=1))
            assert abs(tiny.cosine(grads(model), tiny.gradient(model, loss))) < 1e-10
        model.zero_grad()
        projector.end_window()
    assert calls == [20, 21] * 3


def test_per_sample_rows_of_one_graph_or_of_many(model) -> None:
    for lazily in (False, True):
        model.zero_grad()
        projector = projector_for(model, rows=("extra",))
        forget_loss(model).backward()
        if lazily:
            projector.add_rows(tiny.nll(model, row[None]) for row in RETAIN)
        else:
            logits = model(RETAIN)[:, :-1].transpose(1, 2)
            losses = nn.functional.cross_entropy(logits, RETAIN[:, 1:], reduction="none").mean(-1)
            projector.add_rows(losses)
        stats = projector.project_()
        assert stats.k == len(RETAIN)
        for row in RETAIN:
            r = tiny.gradient(model, tiny.nll(model, row[None]))
            assert abs(tiny.cosine(grads(model), r)) < 1e-9
        projector.end_window()
        assert not projector.window.extra


def test_smoothed_row(model) -> None:
    projector = projector_for(model, row_ema=0.8, rows=("batch",), granularity="global")
    smooth = None
    for seed in (30, 31, 32):
        r = tiny.gradient(model, tiny.nll(model, tiny.batch(seed)))
        smooth = r if smooth is None else 0.8 * smooth + 0.2 * r
        projector.update(tiny.nll(model, tiny.batch(seed)))
        forget_loss(model).backward()
        g = grads(model)
        projector.project_(retain_weight=0.3)
        expected = g - (g @ smooth) / (smooth @ smooth) * smooth + 0.3 * r
        torch.testing.assert_close(grads(model), expected)
        model.zero_grad()
        projector.end_window()


def test_rows_from_gradients_equal_rows_from_losses(model) -> None:
    results = []
    for by_hand in (False, True):
        projector = projector_for(model)
        if by_hand:
            (4 * tiny.nll(model, RETAIN)).backward()
            projector.update_from_grads(0.25)
            assert model.place.grad is None
        else:
            projector.update(tiny.nll(model, RETAIN))
        forget_loss(model).backward()
        projector.project_(retain_weight=1.0)
        results.append(grads(model))
        model.zero_grad()
    torch.testing.assert_close(results[0], results[1])


def test_three_backwards_give_the_same_global_direction(model) -> None:
    """The memory-lean way, by hand: gamma L_f + (alpha - gamma c) L_r in one backward pass."""
    stats_c = []
    projector = projector_for(model, granularity="global")
    g, r = tiny.gradient(model, forget_loss(model)), tiny.gradient(model, tiny.nll(model, RETAIN))
    stats_c.append(float(g @ r / (r @ r)))
    window(model, projector, retain_weight=0.4, forget_scale=1.5)
    loss = 1.5 * forget_loss(model) + (0.4 - 1.5 * stats_c[0]) * tiny.nll(model, RETAIN)
    torch.testing.assert_close(grads(model), tiny.gradient(model, loss), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("place", ["retain", "forget", "bank"])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_values_that_are_not_finite(model, place, policy) -> None:
    projector = projector_for(model, nan_policy=policy, history=2)
    bad = tiny.nll(model, FORGET) * math.nan
    if place == "bank":
        projector.set_bank([lambda: [(tiny.nll(model, tiny.batch(8)) * math.nan, 1.0)]])
    projector.update(bad if place == "retain" else tiny.nll(model, RETAIN))
    (bad if place == "forget" else forget_loss(model)).backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = tiny.values(model)
    if policy == "raise":
        with pytest.raises(NumericalError, match="not finite"):
            projector.project_()
        return
    stats = projector.project_(retain_weight=1.0)
    if place == "bank":
        assert "dropped_rows" in stats.flags
        assert stats.k == 1
        assert torch.isfinite(grads(model)).all()
    else:
        assert "skipped_window" in stats.flags
        optimizer.step()
        assert torch.equal(tiny.values(model), before)
        assert not optimizer.state
    projector.end_window()
    assert len(projector.window.history) == (place != "retain")
    model.zero_grad()
    projector_stats = window(model, projector)
    assert torch.isfinite(grads(model)).all()
    assert projector_stats.kept < 1


def test_saved_state_reproduces_the_next_step(model) -> None:
    def make():
        projector = projector_for(model, history=2, row_ema=0.5, refresh_every=4)
        projector.set_bank([lambda: [(tiny.nll(model, tiny.batch(20)), 1.0)]])
        return projector

    first = make()
    for seed in range(3):
        first.update(tiny.nll(model, tiny.batch(30 + seed)))
        forget_loss(model).backward()
        first.project_()
        model.zero_grad()
        first.end_window()
    move(model, 1e-3 * torch.ones_like(tiny.values(model)))
    state = copy.deepcopy(first.state_dict())
    second = make()
    second.load_state_dict(state)
    results = []
    for projector in (first, second, make()):
        stats = window(model, projector)
        results.append((grads(model), stats.window, stats.k, stats.refreshed))
        model.zero_grad()
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:] == (3, 4, False)
    assert not torch.equal(results[0][0], results[2][0])
    with pytest.raises(RecipeError, match="not of this projector"):
        projector_for(model, history=2).load_state_dict(state)
    first.end_window()
    first.update(tiny.nll(model, RETAIN))
    with pytest.raises(RecipeError, match="open"):
        first.state_dict()


def test_windows_out_of_order_are_refused(model) -> None:
    projector = projector_for(model)
    with pytest.raises(RecipeError, match="no retain gradient"):
        projector.project_()
    window(model, projector)
    with pytest.raises(RecipeError, match="projected already"):
        projector.project_()
    with pytest.raises(RecipeError, match="projected already"):
        projector.update(tiny.nll(model, RETAIN))
    projector.end_window()
    with pytest.raises(RecipeError, match="no retain gradient"):
        projector.project_()
    with pytest.raises(RecipeError, match="no row to protect"):
        projector_for(model, rows=("extra",)).project_()
    window(model, projector)
    assert projector.projections == 2
    projector.reset()
    assert projector.projections == 0


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"clip_value": 1.0}, RecipeError, "clipping"),
        ({"mode": "hrad"}, UnknownNameError, "hard"),
        ({"granularity": "per-tenor"}, UnknownNameError, "per-tensor"),
        ({"histroy": 3}, UnknownNameError, "history"),
        ({"mode": "conflict"}, RecipeError, "one row"),
        ({"row_dtype": torch.bfloat16, "rtol": 1e-7}, RecipeError, "half precision"),
        ({"refresh_every": 0, "strength": 2.0}, ProblemsError, "strength"),
        ({"margin": 0.5}, RecipeError, "one-sided"),
        ({"history": 2, "rows": ("batch",)}, RecipeError, "history"),
        ({"scope": "nothing"}, RecipeError, "no parameter"),
        ({"metric": "adam"}, RecipeError, "optimizer"),
        ({"metric": "fisher"}, RecipeError, "diagonal"),
    ],
)
def test_bad_settings_are_refused(model, settings, error, text) -> None:
    with pytest.raises(error, match=text):
        window(model, projector_for(model, **settings))


def test_half_precision_rows_and_parameters(model) -> None:
    model.float()
    window(model, projector_for(model, row_dtype=torch.bfloat16, history=1))
    r = tiny.gradient(model, tiny.nll(model, RETAIN))
    assert abs(tiny.cosine(grads(model), r)) < 1e-2
    half = tiny.TinyTransformer().bfloat16()
    stats = window(half, projector_for(half, row_dtype=torch.float32))
    assert half.qkv.weight.grad.dtype == torch.bfloat16
    assert 0 < stats.residual < 2e-2  # what bfloat16 gradients can hold, measured as stored


def test_fisher_metric_constrains_the_preconditioned_step(model) -> None:
    fisher = {n: torch.rand_like(p) ** 2 for n, p in model.named_parameters()}
    projector = projector_for(model, metric="fisher", fisher=fisher, granularity="global")
    window(model, projector)
    r = tiny.gradient(model, tiny.nll(model, RETAIN))
    P = torch.cat(
        [
            1 / (fisher[n].float() + 1e-3 * fisher[n].float().mean()).reshape(-1).double()
            for n, _ in model.named_parameters()
        ]
    )
    assert abs(tiny.cosine(P * grads(model), r)) < 1e-6
    assert abs(tiny.cosine(grads(model), r)) > 1e-4
