"""What the decoupled merge promises, through the engine: its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from decoupled_models import (
    FP64,
    MODES,
    NAME,
    ROTATION_ONLY,
    cayley,
    corrected,
    facts_of,
    fitted,
    inverse_cayley,
    mean_of,
    merged,
    noisy,
    orthogonal,
    run,
    skew,
    split_oracle,
    weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from orthomerge import merge

cases = st.tuples(
    st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.sampled_from([1.0, 10.0, 300.0])
)
modes = st.sampled_from(MODES)
seeds = st.integers(0, 10_000)


@given(cases, modes, seeds)
@settings(max_examples=40)
def test_equals_the_anchored_oracle(case, mode, seed) -> None:
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    experts = noisy(W0, count, 0.02, seed + 1)
    anchor = 1e-3  # far from the limit, which special forms of the fit take
    generators, residuals = split_oracle(W0, experts, anchor)
    c_max = 3 * math.sqrt(count) if mode == "robust" else math.inf
    R = cayley(corrected(generators, [1.0] * count, c_max))
    wanted = W0 @ R + 0.4 * sum(residuals)
    found = merged(
        W0, experts, mode=mode, anchor=anchor, residual={"method": "task-arithmetic", "scale": 0.4}
    )
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@given(cases, modes, seeds)
@settings(max_examples=25)
def test_one_expert_is_itself_and_equal_experts_are_themselves(case, mode, seed) -> None:
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    (W,) = noisy(W0, 1, 0.05, seed + 1)
    np.testing.assert_allclose(merged(W0, [W], mode=mode), W, atol=1e-12)
    found = merged(W0, [W] * count, mode=mode, residual=mean_of(count))
    np.testing.assert_allclose(found, W, atol=1e-12)


@given(cases, modes, seeds)
@settings(max_examples=25)
def test_order_and_scale(case, mode, seed) -> None:
    """The order does not matter; scaling everything scales the result."""
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    experts = noisy(W0, count, 0.02, seed + 1)
    one = merged(W0, experts, mode=mode)
    np.testing.assert_allclose(merged(W0, experts[::-1], mode=mode), one, atol=1e-10)
    for a in (1e-3, 3.7, 1e4):
        scaled = merged(a * W0, [a * W for W in experts], mode=mode)
        np.testing.assert_allclose(scaled / a, one, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (5, 8), (4, 11)])
@pytest.mark.parametrize("mode", MODES)
def test_turning_inputs_and_outputs_turns_the_result(shape, mode) -> None:
    o, n = shape
    W0 = weight(o, n, 5.0, 1)
    experts = noisy(W0, 3, 0.05, 2)
    H, G = orthogonal(o, 3), orthogonal(n, 4)
    choice = {"mode": mode, "residual": mean_of(3)}
    found = merged(H @ W0 @ G, [H @ W @ G for W in experts], **choice)
    np.testing.assert_allclose(found, H @ merged(W0, experts, **choice) @ G, atol=1e-11)


@pytest.mark.parametrize("shape", [(9, 6), (5, 8)])
def test_a_rotation_and_its_inverse_cancel(shape) -> None:
    W0 = weight(*shape, 5.0, 1)
    R = expm(skew(shape[1], 0.5, 2))
    if shape[0] < shape[1]:  # turn what the rows span, or the smallest rotation is another one
        V = np.linalg.svd(W0, full_matrices=False)[2]
        R = np.eye(shape[1]) + V.T @ (expm(skew(shape[0], 0.5, 2)) - np.eye(shape[0])) @ V
    facts = facts_of(W0, [W0 @ R, W0 @ R.T], zero_guard=1e-4)
    assert facts["zeroed"] == 1
    assert facts["merged_norm"] == 0.0
    found = merged(W0, [W0 @ R, W0 @ R.T], zero_guard=1e-4)
    np.testing.assert_allclose(found, W0, atol=1e-5)


def test_near_opposites_are_capped() -> None:
    W0 = weight(9, 6, 3.0, 1)
    L = skew(6, 0.5, 2)
    experts = [W0 @ cayley(L), W0 @ cayley(-0.9 * L)]
    facts = facts_of(W0, experts, anchor=1e-9, c_max=3.0)
    assert facts["capped"] == 1
    assert facts["correction"] == pytest.approx([3.0])
    assert facts["merged_norm"] == pytest.approx(3 * np.linalg.norm(0.05 * L), rel=1e-6)
    free = facts_of(W0, experts, anchor=1e-9)
    assert free["correction"] == pytest.approx([19.0], rel=1e-5)
    assert facts_of(W0, experts, anchor=1e-9, mode="robust")["correction"] == pytest.approx(
        [3 * math.sqrt(2)]
    )


def energy(W: np.ndarray) -> float:
    V = W / np.linalg.norm(W, axis=1, keepdims=True)
    distances = np.linalg.norm(V[:, None] - V[None], axis=2)
    return (1 / distances[~np.eye(len(W), dtype=bool)]).sum()


@given(cases, modes, seeds)
@settings(max_examples=20)
def test_rotated_base_keeps_rows_spectrum_and_energy(case, mode, seed) -> None:
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    experts = noisy(W0, count, 0.05, seed + 1)
    rotated = merged(W0, experts, mode=mode, residual=ROTATION_ONLY)
    rows = np.linalg.norm(W0, axis=1)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), rows, rtol=1e-10)
    spectra = [np.linalg.svd(W)[1] for W in (rotated, W0)]
    np.testing.assert_allclose(*spectra, atol=1e-12)
    if n > 2:  # in two dimensions rows can coincide
        assert energy(rotated) == pytest.approx(energy(W0), rel=1e-7)


@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (5, 8), (3, 11), (7,), (4, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["faithful", "robust", "reproduce"])
def test_experts_that_did_not_change_give_the_base_bit_for_bit(shape, dtype, mode) -> None:
    W0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    W0.view(-1)[1] = -0.0
    found = run(W0, [W0] * 3, dtype=dtype, mode=mode, rotate_conv=True, run_settings={})
    bits = [tensor.view(torch.uint8) for tensor in (found.tensors[NAME], W0)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("mode", MODES)
def test_without_conflicts_the_residual_method_has_it_all(mode) -> None:
    W0 = weight(9, 6, 5.0, 1)
    (W,) = noisy(W0, 1, 0.05, 2)
    experts = [W, W0 + 0.3 * (W - W0)]
    choice = {"mode": mode, "variant": "conflict-aware", "residual": {"method": "ties"}}
    found = run(W0, experts, **choice)
    plain = merge(
        [{NAME: torch.tensor(V)} for V in experts],
        base={NAME: torch.tensor(W0)},
        method="ties",
        run_settings=FP64,
    )
    assert torch.equal(found.tensors[NAME], plain.tensors[NAME])
    assert [m["conflict_rows"] for m in found.details[NAME]["facts"]["models"]] == [0, 0]


def test_conflict_aware_explains_only_rows_in_conflict() -> None:
    W0 = weight(10, 6, 5.0, 1)
    experts = noisy(W0, 3, 0.05, 2)
    mean = sum(W - W0 for W in experts) / 3
    conflicts = [((W - W0) * mean).sum(1) < 0 for W in experts]
    models = facts_of(W0, experts, variant="conflict-aware")["models"]
    assert [m["conflict_rows"] for m in models] == [int(c.sum()) for c in conflicts]
    assert sum(c.sum() for c in conflicts) > 0
    targets = [W0 + c[:, None] * (W - W0) for c, W in zip(conflicts, experts, strict=True)]
    R = [fitted(W0, X, 1e-3) for X in targets]
    turned = cayley(corrected([inverse_cayley(r) for r in R], [1.0] * 3))
    wanted = W0 @ turned + sum(W - W0 @ r for W, r in zip(experts, R, strict=True)) / 3
    found = merged(W0, experts, variant="conflict-aware", anchor=1e-3)
    np.testing.assert_allclose(found, wanted, atol=1e-11)


@given(cases, modes, seeds)
@settings(max_examples=25)
def test_merged_norm_is_the_weighted_mean_of_the_experts(case, mode, seed) -> None:
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    experts = noisy(W0, count, 0.02, seed + 1)
    weights = list(np.random.default_rng(seed).uniform(0.1, 2, count))
    generators, _ = split_oracle(W0, experts, 1e-3)
    sizes = [np.linalg.norm(A) for A in generators]
    facts = facts_of(W0, experts, mode=mode, weights=weights, anchor=1e-3, c_max=1e9)
    assert facts["merged_norm"] == pytest.approx(np.average(sizes, weights=weights), rel=1e-8)
