"""Methods that prepare LoRA adapters and let another method merge them: pico, norm-cap, nesting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthomerge.adapters.memory import AdapterState
from orthomerge.errors import RecipeError, UnknownNameError
from orthomerge.linalg.factors import Factors
from orthomerge.merging.lora.lifting import run_nested_factors
from orthomerge.merging.methods.norm_cap import norm_cap
from orthomerge.merging.methods.pico import pico
from orthomerge.merging.plan import MergeRequest
from orthomerge.merging.planning.planner import build_plan
from orthomerge.merging.registry import get_method
from orthomerge.merging.run import run_plan


def draw(ranks=(2, 3, 1), rows=8, columns=6, seed=0, sizes=(1.0, 1.0, 1.0)):
    rng = np.random.default_rng(seed)
    return [
        Factors(
            torch.tensor(size * rng.standard_normal((rows, r))),
            torch.tensor(rng.standard_normal((r, columns))),
        )
        for r, size in zip(ranks, sizes, strict=True)
    ]


def dense(product):
    product = getattr(product, "tensor", product)
    return (product.B @ product.A).numpy()


def pico_by_hand(factors, weights):
    """Return the damped matrices, from a full decomposition of the stack of B."""
    stack = np.concatenate([f.B.numpy() for f in factors], 1)
    U, sigma, _ = np.linalg.svd(stack)
    shares = np.zeros(len(U))
    shares[: len(sigma)] = sigma**2 / np.sum(sigma**2)
    damping = U @ np.diag(1 / (1 + (len(factors) - 1) * shares)) @ U.T
    damped = [damping @ dense(f) for f in factors]
    return sum(w * D for w, D in zip(weights, damped, strict=True))


def test_pico_equals_the_oracle() -> None:
    factors, weights = draw(), [1.0, -0.5, 2.0]
    damped = pico_by_hand(factors, weights)
    total = sum(w * dense(f) for w, f in zip(weights, factors, strict=True))
    wanted = damped * np.linalg.norm(total) / np.linalg.norm(damped)
    merged = pico(factors, weights=weights, gauge="stored")
    np.testing.assert_allclose(dense(merged), wanted, atol=1e-12)
    assert merged.facts["rescaled"] == pytest.approx(np.linalg.norm(total) / np.linalg.norm(damped))
    assert np.linalg.norm(wanted - total) > 0.05 * np.linalg.norm(total)


@pytest.mark.parametrize("op", ["ties", "tsv-m", "task-arithmetic", {"method": "knots"}])
def test_pico_keeps_the_size_that_the_op_gives(op) -> None:
    factors, weights = draw(), [1.0, 1.0, 1.0]
    plain = dense(run_nested_factors(op, factors, weights=weights))
    found = dense(pico(factors, weights=weights, op=op))
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(plain), rel=1e-10)
    assert np.linalg.norm(found - plain) > 1e-3 * np.linalg.norm(plain)


def test_a_direction_that_all_share_loses_against_one_that_is_alone() -> None:
    """All B hold e1; the first holds e2 as well: 3 + 1 of 4 squares, N = 3."""
    e = torch.eye(3, dtype=torch.float64)
    rows = torch.eye(4, dtype=torch.float64)
    factors = [
        Factors(e[:, :2], rows[:2]),
        Factors(e[:, :1], rows[2:3]),
        Factors(e[:, :1], rows[3:]),
    ]
    merged = dense(pico(factors, weights=[1.0, 1.0, 1.0], gauge="stored"))
    shared, alone = 1 / (1 + 2 * 3 / 4), 1 / (1 + 2 * 1 / 4)
    np.testing.assert_allclose(merged[1, 1] / merged[0, 0], alone / shared, atol=1e-12)


def test_opposite_adapters_cancel_without_a_blown_up_rest() -> None:
    one = draw((3,), sizes=(1.0,))[0]
    factors = [one, one.scaled(-1.0)]
    merged = pico(factors, weights=[1.0, 1.0])
    assert merged.facts["rescaled"] == 1.0
    np.testing.assert_allclose(dense(merged), 0.0, atol=1e-12)


def test_balanced_pico_depends_on_the_changes_only() -> None:
    factors = draw()
    again = [Factors(5.0 * factors[0].B, factors[0].A / 5.0), *factors[1:]]
    given = {"weights": [1.0, 1.0, 1.0]}
    one, other = (dense(pico(f, **given)) for f in (factors, again))
    np.testing.assert_allclose(one, other, atol=1e-10)
    one, other = (dense(pico(f, gauge="stored", **given)) for f in (factors, again))
    assert np.linalg.norm(one - other) > 1e-3


@pytest.mark.parametrize(
    ("sizes", "capped"), [((1.0, 1.1, 50.0), 1), ((1.0, 1.0, 1.0), 0), ((0.001, 1.0, 1.1), 0)]
)
@pytest.mark.parametrize("deviations", [3.0, 1.0])
def test_norm_cap_equals_the_oracle(sizes, capped, deviations) -> None:
    factors, weights = draw((2, 2, 2), sizes=sizes), [1.0, -0.5, 2.0]
    factors = [f.scaled(s / float(f.norm())) for f, s in zip(factors, sizes, strict=True)]
    norms = np.array([np.linalg.norm(dense(f)) for f in factors])
    middle = np.sort(norms)[1]
    cap = middle + deviations * np.sort(np.abs(norms - middle))[1]
    wanted = sum(
        w * min(1.0, cap / norm) * dense(f)
        for w, norm, f in zip(weights, norms, factors, strict=True)
    )
    merged = norm_cap(factors, weights=weights, deviations=deviations)
    np.testing.assert_allclose(dense(merged), wanted, atol=1e-12)
    assert merged.facts["cap"] == pytest.approx(cap)
    if deviations == 3.0:
        assert merged.facts["capped"] == capped


def test_of_two_models_none_is_capped() -> None:
    factors = draw((2, 2, 2), sizes=(1.0, 100.0, 0.0))[:2]
    merged = norm_cap(factors, weights=[1.0, 1.0])
    np.testing.assert_allclose(dense(merged), sum(map(dense, factors)), atol=1e-10)


def test_norm_cap_works_inside_pico_and_pico_inside_norm_cap() -> None:
    factors, weights = draw(sizes=(1.0, 1.0, 100.0)), [1.0, 1.0, 1.0]
    norms = [float(f.norm()) for f in factors]
    median = float(np.median(norms))
    cap = median + 3 * float(np.median(np.abs(np.array(norms) - median)))
    capped = [f.scaled(min(1.0, cap / n)) for f, n in zip(factors, norms, strict=True)]
    found = dense(norm_cap(factors, weights=weights, op="pico"))
    np.testing.assert_allclose(found, dense(pico(capped, weights=weights)), atol=1e-10)
    nested = {"method": "norm-cap", "op": {"method": "ties", "density": 0.5}}
    assert np.isfinite(dense(pico(factors, weights=weights, op=nested))).all()


def test_a_batch_of_modules_is_taken_one_by_one() -> None:
    parts = [draw(seed=seed) for seed in (0, 1)]
    batch = [
        Factors(torch.stack([p[i].B for p in parts]), torch.stack([p[i].A for p in parts]))
        for i in range(3)
    ]
    weights = [1.0, 0.5, 2.0]
    found = run_nested_factors("pico", batch, weights=weights)
    for at, part in enumerate(parts):
        wanted = dense(pico(part, weights=weights))
        np.testing.assert_allclose(dense(Factors(found.B[at], found.A[at])), wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "op", "words"),
    [
        ("knots", "orthomerge-decoupled", "merges task vectors"),
        ("knots", "pico", "merges task vectors"),
        ("core", "slerp", "merges task vectors"),
        ("pico", "slerp", "merges low-rank factors"),
        ("pico", "orthomerge-decoupled", "merges low-rank factors"),
    ],
)
def test_what_cannot_be_nested_is_refused(method, op, words) -> None:
    with pytest.raises(RecipeError, match=words):
        get_method(method).parameters["op"].check(op)


@pytest.mark.parametrize("method", ["ties", "knots"])
def test_weights_may_cancel_where_ties_divides_by_those_that_agree(method) -> None:
    """Of -4 and -3 both agree: -(4 + 3) / 2."""
    prefix, states = "base_model.model.q", []
    for name, value in (("a", 4.0), ("b", -3.0)):
        tensors = {
            f"{prefix}.lora_B.weight": torch.ones(1, 1),
            f"{prefix}.lora_A.weight": torch.tensor([[value]]),
        }
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
        states.append(AdapterState(tensors, config, name))
    ties = {"density": 1.0}
    parameters = ties if method == "ties" else {"op": {"method": "ties", **ties}}
    request = MergeRequest(tuple(states), method=method, weights=(-1.0, 1.0), parameters=parameters)
    merged = run_plan(build_plan(request)).tensors
    B, A = (merged[f"{prefix}.lora_{factor}.weight"] for factor in "BA")
    assert (B @ A).item() == pytest.approx(-3.5)


def test_defaults_of_nested_methods_are_filled_in() -> None:
    check = get_method("pico").parameters["op"].check
    found = check({"method": "knots", "op": {"method": "ties", "density": 0.3}})
    assert found["concatenate"] == "columns"
    assert found["op"]["normalize"] is True
    assert get_method("knots").parameters["op"].check("ties")["density"] == 0.2
    with pytest.raises(UnknownNameError, match="Did you mean 'density'"):
        check({"method": "knots", "op": {"method": "ties", "densty": 0.3}})
