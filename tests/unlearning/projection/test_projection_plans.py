"""Presets, memory plans and the doctor."""

from __future__ import annotations

import json

import pytest
import tiny_projection as tiny
import torch
from torch import nn

from orthomerge.errors import BudgetError, NumericalError, UnknownNameError
from orthomerge.unlearning import RetainProjector
from orthomerge.unlearning.projection import (
    PRESETS,
    ProjectionSettings,
    check_projection,
    plan_memory,
    preset,
)

RETAIN, FORGET = tiny.batch(1), tiny.batch(2)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_takes_a_step(name) -> None:
    model = tiny.TinyTransformer()
    fisher = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    projector = RetainProjector(model, fisher=fisher, **preset(name))
    rows = projector.settings.rows
    if "extra" in rows:
        projector.add_rows(tiny.nll(model, row[None]) for row in RETAIN)
    projector.update(tiny.nll(model, RETAIN))
    (-tiny.nll(model, FORGET)).backward()
    stats = projector.project_()
    with projector.guard(torch.optim.SGD(model.parameters(), lr=0.1)):
        pass
    assert stats.stage == ("A" if "stage" in PRESETS[name] else "AB")
    assert (stats.kept is None) == (name == "off")


def test_pcgrad_and_gem_against_their_formulas() -> None:
    for aligned in (1.0, -1.0):
        model = tiny.TinyTransformer().double()
        r = tiny.gradient(model, tiny.nll(model, RETAIN))
        loss = aligned * tiny.nll(model, RETAIN) + 0.3 * tiny.nll(model, FORGET)
        g = tiny.gradient(model, loss)
        for name in ("pcgrad", "gem"):
            model.zero_grad()
            projector = RetainProjector(model, row_dtype=torch.float64, **preset(name))
            if name == "gem":
                projector.add_rows([tiny.nll(model, RETAIN)])
            else:
                projector.update(tiny.nll(model, RETAIN))
            loss = aligned * tiny.nll(model, RETAIN) + 0.3 * tiny.nll(model, FORGET)
            loss.backward()
            projector.project_()
            c = float(g @ r / (r @ r))
            # GEM adds v = max(margin, -c) of the memory's gradient; PCGrad max(0, -c).
            added = max(0.5 if name == "gem" else 0.0, -c)
            expected = g + added * r
            torch.testing.assert_close(tiny.flat(p.grad for p in model.parameters()), expected)


def test_unknown_preset() -> None:
    with pytest.raises(UnknownNameError, match="gu-cheap"):
        preset("gu-chaep")


def test_plan_counts_what_a_projector_allocates() -> None:
    model = nn.ModuleDict({"a": nn.Linear(100, 50), "b": nn.Linear(50, 10)})
    settings = ProjectionSettings(history=3, row_ema=0.5)
    plan = plan_memory(model, settings, bank=2)
    projector = RetainProjector(model, history=3, row_ema=0.5)
    projector.set_bank([lambda: [], lambda: []])
    assert plan.row_bytes == projector.window.bytes
    assert plan.rows == 7
    assert plan.parameters == 5560
    assert plan.snapshot_bytes == 4 * 5560
    part = plan_memory(model, settings, scope="^a", bank=2)
    assert part.row_bytes == 4 * (7 * 5050 + 510)
    json.dumps(plan.as_dict())


def test_plan_refuses_with_numbers_and_names_what_would_fit() -> None:
    model = nn.Linear(1000, 1000, bias=False, device="meta")  # 4 MB a row
    full = plan_memory(model).device_bytes
    assert plan_memory(model, free_bytes=full).device_bytes == full
    with pytest.raises(BudgetError) as caught:
        plan_memory(model, free_bytes=full - 1)
    assert "0.056 GB" in str(caught.value)
    assert "bfloat16" in caught.value.remedy
    with pytest.raises(BudgetError, match="Narrow the scope"):
        plan_memory(model, free_bytes=1000)
    host = ProjectionSettings(row_device="cpu")
    with pytest.raises(BudgetError, match="host"):
        plan_memory(model, host, host_bytes=1000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_doctor_passes_a_sound_model_and_leaves_it_unchanged(dtype) -> None:
    model = tiny.TinyTransformer().to(dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = check_projection(
        model, lambda: -tiny.nll(model, FORGET), lambda: tiny.nll(model, RETAIN)
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    if dtype == torch.float64:
        assert found.slope_projected >= 1.95
        assert found.slope_raw <= 1.1
    assert abs(found.derivative_projected) < 0.1 * abs(found.derivative_raw)
    assert found.forget_change < 0
    assert found.cosine == pytest.approx(
        tiny.cosine(
            tiny.gradient(model, -tiny.nll(model, FORGET)),
            tiny.gradient(model, tiny.nll(model, RETAIN)),
        ),
        abs=1e-6,
    )
    json.dumps(found.as_dict(), allow_nan=False)


def test_doctor_refuses_what_cannot_work() -> None:
    model = tiny.TinyTransformer().double()

    def forget():
        return -tiny.nll(model, FORGET)

    def noisy():
        return tiny.nll(model, RETAIN) * (1 + 0.01 * torch.rand(()))

    def detached_in_part():  # its gradient is not the gradient of its value
        loss = tiny.nll(model, RETAIN)
        return loss + 3 * tiny.nll(model, FORGET).detach()

    with pytest.raises(NumericalError, match="two calls"):
        check_projection(model, forget, noisy)
    with pytest.raises(NumericalError, match="first order"):
        check_projection(model, forget, detached_in_part)
    with pytest.raises(NumericalError, match="zero or not finite"):
        check_projection(model, lambda: 0 * forget(), lambda: tiny.nll(model, RETAIN))
    assert all(torch.isfinite(p).all() for p in model.parameters())
