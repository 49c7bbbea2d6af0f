"""Orthogonal stacks: the solvers against formulas on the stack itself, closed forms, batches."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import (
    adam_stack,
    mean_principal_cosine,
    orthogonalise_stack,
    whitened_stack,
)

LOOSE = ("lbfgs", "gd", "ridge", "lowdin")
TWO = np.array([[1.0, 0.0], [0.5, math.sqrt(3) / 2]])


def stack(rows, d, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, d))


def blocks(sizes):
    """Ones on the diagonal blocks."""
    mask = np.zeros((sum(sizes), sum(sizes)))
    start = 0
    for size in sizes:
        mask[start : start + size, start : start + size] = 1
        start += size
    return mask


def run(W, sizes, solver, **settings):
    """Return V = C W, and the report."""
    settings = {"normalise": False, "tolerance": 1e-10, "steps": 4000, **settings}
    found = orthogonalise_stack(torch.tensor(W @ W.T), sizes, solver, **settings)
    return found.C.numpy() @ W, found


def loss(V, W, sizes, gamma):
    off = 1 - blocks(sizes)
    return ((V @ V.T * off) ** 2).sum() + gamma * ((V - W) ** 2).sum()


def slope(V, W, sizes, gamma):
    return 4 * (V @ V.T * (1 - blocks(sizes))) @ V + 2 * gamma * (V - W)


def overlap(V, sizes):
    K, inside = V @ V.T, blocks(sizes)
    return np.linalg.norm(K * (1 - inside)) / np.linalg.norm(K * inside)


def cosine(G, sizes, **options):
    return mean_principal_cosine(whitened_stack(G, sizes), sizes, **options)


def root(S, power):
    values, vectors = np.linalg.eigh(S)
    return (vectors * values**power) @ vectors.T


# Closed forms and oracles, one two-vector stack.


def test_two_equal_vectors_shrink_to_the_root_of_a_cubic() -> None:
    """V = c W with 2c³ + c - 1 = 0 at γ = 1."""
    W = np.array([[1.0, 0.0], [1.0, 0.0]])
    V, _ = run(W, [1, 1], "lbfgs", gamma=1.0)
    c = next(r.real for r in np.roots([2, 0, 1, -1]) if abs(r.imag) < 1e-12)
    np.testing.assert_allclose(V, c * W, atol=1e-9)
    assert c == pytest.approx(0.5897545123, abs=1e-10)
    assert loss(V, W, [1, 1], 1.0) == pytest.approx(0.5785468479, abs=1e-10)


@pytest.mark.parametrize("solver", ["lbfgs", "gd"])
@pytest.mark.parametrize(
    ("gamma", "least", "left"),
    [(1.0, 0.1053880924, 0.1165115), (0.1, 0.0130472191, 0.0140598), (10, 0.3603396478, 0.3836814)],
)
def test_two_vectors_at_sixty_degrees(solver, gamma, least, left) -> None:
    V, found = run(TWO, [1, 1], solver, gamma=gamma)
    assert loss(TWO, TWO, [1, 1], gamma) == pytest.approx(0.5)
    assert loss(V, TWO, [1, 1], gamma) == pytest.approx(least, abs=1e-9)
    assert float(found.overlap_before) == pytest.approx(0.5)
    assert float(found.overlap_after) == pytest.approx(left, abs=1e-6)
    if gamma == 1.0:
        wanted = [[0.9359820, -0.1930591], [0.3007969, 0.9071138]]
        np.testing.assert_allclose(V, wanted, atol=1e-7)


def test_ridge_of_two_vectors() -> None:
    V, _ = run(TWO, [1, 1], "ridge", gamma=1.0)
    wanted = [[0.8333333, -0.2886751], [0.1666667, 0.8660254]]
    np.testing.assert_allclose(V, wanted, atol=1e-7)


def test_lowdin_of_two_vectors() -> None:
    V, _ = run(TWO, [1, 1], "lowdin")
    np.testing.assert_allclose(V, [[0.96592583, -0.25881905], [0.25881905, 0.96592583]], atol=1e-8)
    V, found = run(TWO, [1, 1], "lowdin", strength=0.5)
    np.testing.assert_allclose(V, [[0.97500328, -0.12367064], [0.38039972, 0.90621293]], atol=1e-8)
    assert float(found.overlap_after) == pytest.approx(0.26794919, abs=1e-8)


# The solvers against formulas on the stack itself.


def test_descent_on_the_gram_matrix_is_descent_on_the_stack() -> None:
    W, sizes = stack(9, 50), [3, 4, 2]
    V = W.copy()
    for _ in range(200):
        V = V - 1e-3 * slope(V, W, sizes, 0.7)
    found, report = run(W, sizes, "gd", gamma=0.7, rate=1e-3, steps=200, tolerance=0.0)
    assert int(report.steps) == 200
    assert np.linalg.norm(found - V) <= 1e-12 * np.linalg.norm(V)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=4),
    st.integers(2, 14),
    st.sampled_from([0.3, 1.0, 10.0]),
    st.integers(0, 999),
)
def test_both_descents_end_where_the_gradient_vanishes(sizes, d, gamma, seed) -> None:
    W = stack(sum(sizes), d, seed)
    for solver, small in (("lbfgs", 1e-4), ("gd", 3e-2)):
        V, _ = run(W, sizes, solver, gamma=gamma, tolerance=1e-7, steps=300)
        least = loss(V, W, sizes, gamma)
        assert np.linalg.norm(slope(V, W, sizes, gamma)) <= small * (1 + least)
        assert least <= loss(W, W, sizes, gamma)


def test_both_descents_find_the_same_point() -> None:
    W, sizes = stack(9, 30), [3, 4, 2]
    first, second = (run(W, sizes, s, gamma=30.0, tolerance=1e-11)[0] for s in ("lbfgs", "gd"))
    np.testing.assert_allclose(first, second, atol=1e-7)


def test_gradient_descent_never_rises() -> None:
    W, sizes = stack(9, 30), [3, 4, 2]
    losses = [loss(run(W, sizes, "gd", gamma=1.0, steps=k)[0], W, sizes, 1.0) for k in range(25)]
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_less_weight_on_staying_leaves_less_overlap() -> None:
    W, sizes = stack(9, 30, 5), [3, 2, 4]
    found = [run(W, sizes, "lbfgs", gamma=g, normalise=True)[1] for g in (100, 10, 1, 0.1, 0.01)]
    left = [float(f.overlap_after) for f in found]
    assert all(after < before for before, after in itertools.pairwise(left))
    drifts = [float(f.drift) for f in found]
    assert all(after > before for before, after in itertools.pairwise(drifts))
    assert left[0] < float(found[0].overlap_before)
    assert left[-1] < 0.005


def test_ridge_is_the_formula_on_the_stack() -> None:
    sizes = [3, 4, 2]
    W = stack(9, 20)
    parts = np.split(W, np.cumsum(sizes)[:-1])
    wanted = []
    for i, part in enumerate(parts):
        M = np.concatenate([other for j, other in enumerate(parts) if j != i])
        inner = np.linalg.inv(0.35 * np.eye(len(M)) + M @ M.T)
        wanted.append(part - part @ M.T @ inner @ M)
    V, _ = run(W, sizes, "ridge", gamma=0.7)
    np.testing.assert_allclose(V, np.concatenate(wanted), atol=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_lowdin_is_the_formula_on_the_stack(strength) -> None:
    sizes = [3, 4, 2]
    W = stack(9, 20)
    D = W @ W.T * blocks(sizes)
    whitened = root(D, -0.5) @ W
    wanted = root(D, 0.5) @ root(whitened @ whitened.T, -strength / 2) @ whitened
    V, found = run(W, sizes, "lowdin", strength=strength)
    np.testing.assert_allclose(V, wanted, atol=1e-11)
    assert float(found.drift) == pytest.approx(np.linalg.norm(V - W) / np.linalg.norm(W), abs=1e-7)
    if strength == 1.0:
        np.testing.assert_allclose(V @ V.T, D, atol=1e-12)  # each block keeps its own Gram matrix
        U, _, Vh = np.linalg.svd(whitened, full_matrices=False)
        np.testing.assert_allclose(V, root(D, 0.5) @ U @ Vh, atol=1e-11)  # the polar factor


def test_adam_is_adam_on_the_stack() -> None:
    sizes = [2, 3]
    W = stack(5, 12)
    V, m, v = W.copy(), 0.0, 0.0
    rate = 0.01 * math.sqrt((W**2).mean())
    for t in range(1, 41):
        g = slope(V, W, sizes, 1.0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        V = V - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    found = adam_stack(torch.tensor(W), sizes, 1.0, steps=40).numpy()
    np.testing.assert_allclose(found, V, atol=1e-12)
    assert overlap(found, sizes) < overlap(W, sizes)
    padded = np.concatenate([W, np.zeros((1, 12))])
    again = adam_stack(torch.tensor(padded), [2, 3, 1], 1.0, steps=40).numpy()
    np.testing.assert_allclose(again, np.concatenate([V, np.zeros((1, 12))]), atol=1e-12)


# Symmetries, for every solver.


@pytest.mark.parametrize("solver", LOOSE)
def test_the_order_of_blocks_does_not_matter(solver) -> None:
    W, sizes = stack(9, 20), [3, 4, 2]
    order = np.r_[7:9, 0:3, 3:7]
    V, _ = run(W, sizes, solver, gamma=1.0, tolerance=1e-9)
    again, _ = run(W[order], [2, 3, 4], solver, gamma=1.0, tolerance=1e-9)
    tolerance = 1e-12 if solver in ("lowdin", "ridge") else 1e-7
    np.testing.assert_allclose(again, V[order], atol=tolerance * 10)


@pytest.mark.parametrize("solver", LOOSE)
def test_one_block_and_orthogonal_blocks_stay(solver) -> None:
    W = stack(4, 9)
    V, found = run(W, [4], solver)
    assert np.array_equal(V, W)
    assert float(found.overlap_before) == float(found.overlap_after) == float(found.drift) == 0
    apart = np.zeros((4, 9))
    apart[:2, :4], apart[2:, 4:] = W[:2, :4], W[2:, 4:]
    np.testing.assert_allclose(run(apart, [2, 2], solver)[0], apart, atol=1e-14)


@pytest.mark.parametrize("solver", LOOSE)
def test_scale_does_not_matter_once_normalised(solver) -> None:
    W, sizes = stack(6, 20), [2, 4]
    V, _ = run(W, sizes, solver, normalise=True, gamma=1.0, tolerance=1e-9)
    for c in (1e-3, 1e3):
        again, _ = run(c * W, sizes, solver, normalise=True, gamma=1.0, tolerance=1e-9)
        np.testing.assert_allclose(again, c * V, atol=1e-8 * c)


@pytest.mark.parametrize("solver", LOOSE)
def test_rows_of_zeros_stay_and_change_nothing(solver) -> None:
    W, sizes = stack(6, 20), [2, 4]
    padded = np.concatenate([W[:2], np.zeros((3, 20)), W[2:], np.zeros((1, 20))])
    V, _ = run(W, sizes, solver, normalise=True)
    for padded_sizes in ([2, 3, 5], [5, 5]):
        found, _ = run(padded, padded_sizes, solver, normalise=True)
        np.testing.assert_allclose(found[[0, 1, 5, 6, 7, 8]], V, atol=1e-8)
        assert not found[[2, 3, 4, 9]].any()


@pytest.mark.parametrize("solver", LOOSE)
def test_more_rows_than_dimensions_and_zeros_stay_finite(solver) -> None:
    V, found = run(stack(9, 4), [3, 4, 2], solver, steps=100)
    assert np.isfinite(V).all()
    assert float(found.overlap_after) < float(found.overlap_before)
    V, found = run(np.zeros((4, 5)), [2, 2], solver, normalise=True)
    assert not V.any()
    assert float(found.overlap_before) == float(found.overlap_after) == float(found.drift) == 0


@pytest.mark.parametrize("solver", LOOSE)
def test_a_batch_is_its_stacks_one_by_one(solver) -> None:
    sizes = [3, 4, 2]
    each = [stack(9, 20, seed) for seed in range(3)] + [np.zeros((9, 20))]
    each[1][:, 5:] *= 1e-3
    G = torch.stack([torch.tensor(W @ W.T) for W in each]).reshape(2, 2, 9, 9)
    found = orthogonalise_stack(G, sizes, solver, gamma=1.0)
    for at in range(4):
        one = orthogonalise_stack(G[at // 2, at % 2], sizes, solver, gamma=1.0)
        for name in ("C", "overlap_before", "overlap_after", "drift"):
            batch = getattr(found, name)[at // 2, at % 2]
            torch.testing.assert_close(batch, getattr(one, name), rtol=1e-7, atol=1e-7)
        assert int(found.steps[at // 2, at % 2]) == int(one.steps)


# How far blocks span the same space.


def test_principal_cosines_are_those_of_orthonormal_frames() -> None:
    sizes = [3, 4, 2]
    W = stack(9, 12)
    frames = [np.linalg.qr(part.T)[0] for part in np.split(W, np.cumsum(sizes)[:-1])]
    cosines = [
        np.linalg.svd(frames[i].T @ frames[j], compute_uv=False)
        for i in range(3)
        for j in range(i + 1, 3)
    ]
    wanted = np.concatenate(cosines)
    G = torch.tensor(W @ W.T)
    assert float(cosine(G, sizes)) == pytest.approx(wanted.mean(), abs=1e-12)
    rms = math.sqrt((wanted**2).mean())
    assert float(cosine(G, sizes, above=0.99)) == pytest.approx(rms, abs=1e-12)
    both = torch.stack([G, torch.ones(9, 9, dtype=torch.float64)])
    assert cosine(both, sizes)[0] == pytest.approx(wanted.mean(), abs=1e-12)


def test_principal_cosines_of_equal_spans_are_one() -> None:
    W = stack(3, 12)
    mixed = np.concatenate([W, stack(3, 3, 1) @ W, np.zeros((2, 12))])
    G = torch.tensor(mixed @ mixed.T)
    assert float(cosine(G, [3, 3, 2])) == pytest.approx(1.0, abs=1e-12)
    assert float(cosine(G[:3, :3], [3])) == 0.0


def test_what_does_not_fit_or_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericalError, match="one row for each"):
        orthogonalise_stack(torch.eye(3), [1, 1])
    with pytest.raises(NumericalError, match="not finite"):
        orthogonalise_stack(torch.full((2, 2), math.nan), [1, 1])


def test_the_literal_loss_is_rejected_for_what_it_minimises() -> None:
    """Without the square and with i = j it is ‖ΣV_i‖² + γ Σ‖V_i - W_i‖²: the sum is only shrunk."""
    W, gamma = np.array([[3.0, 0.0], [0.0, 4.0]]), 1.0
    V = W - W.sum(0) / (gamma + len(W))
    np.testing.assert_allclose(V, [[2.0, -4 / 3], [-1.0, 8 / 3]])
    gradient = 2 * V.sum(0) + 2 * gamma * (V - W)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    np.testing.assert_allclose(V.sum(0), gamma / (gamma + len(W)) * W.sum(0))
    assert abs(V[0] @ V[1]) > 5  # two orthogonal updates have become far from orthogonal
    np.testing.assert_allclose(run(W, [1, 1], "lbfgs", gamma=1.0)[0], W, atol=1e-12)
