"""KnOTS and core coordinates against formulas written with full singular value decompositions."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

from orthomerge.linalg.factors import Factors
from orthomerge.merging import registry
from orthomerge.merging.draws import Draws
from orthomerge.merging.lora.lifting import coordinates, lifted
from orthomerge.merging.methods.core import core
from orthomerge.merging.methods.knots import knots
from orthomerge.merging.registry import all_methods, get_method

B1, A1 = [[1, 0], [2, 1], [0, 1]], [[1, 0, 2], [0, 0, -1]]
B2, A2 = [[0, 1], [1, 0], [1, 1]], [[2, 1, 0], [1, -1, 1]]
KEEP_ALL = {"method": "ties", "density": 1.0}


def pair():
    def product(B, A):
        return Factors(torch.tensor(B).double(), torch.tensor(A).double())

    return [product(B1, A1), product(B2, A2)]


def random_pair(ranks=(2, 5), rows=12, columns=9, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Factors(
            torch.tensor(rng.standard_normal((rows, r))),
            torch.tensor(rng.standard_normal((r, columns))),
        )
        for r in ranks
    ]


def dense(merged):
    product = getattr(merged, "tensor", merged)
    return (product.B @ product.A).numpy()


def matrices(factors):
    return [(f.B @ f.A).numpy() for f in factors]


def joint_frame(stack):
    """Left singular vectors that carry weight."""
    U, s, _ = np.linalg.svd(stack, full_matrices=False)
    return U[:, s > 1e-10 * s[0]]


def ties_by_hand(items, weights, density):
    """Trim to the k largest magnitudes, elect by the weighted sum, average what agrees."""
    kept = []
    for Z in items:
        k = max(1, int(density * Z.size + 1e-9))
        cut = np.sort(np.abs(Z).ravel())[-k]
        kept.append(np.where(np.abs(Z) >= cut, Z, 0.0))
    total = sum(w * Z for w, Z in zip(weights, kept, strict=True))
    sign = np.where(total >= 0, 1.0, -1.0)
    up, down = np.zeros_like(total), np.zeros_like(total)
    for w, Z in zip(weights, kept, strict=True):
        agrees = w * Z * sign > 0
        up += np.where(agrees, w * Z, 0.0)
        down += np.where(agrees, abs(w), 0.0)
    return up / np.where(down > 0, down, 1.0)


def test_ties_in_the_coordinates_of_three_by_three_matrices() -> None:
    """Computed by hand from the two matrices.

    The first model leaves the second column alone, so there the merge is the second's change. An
    election that counts what rounding leaves of these zeros gives -1.0071, 0.9845, 0.0624 instead.
    """
    wanted = [[0.8411, -1, 1.6513], [1.6539, 1, 1.8296], [2.8961, 0, -1.3298]]
    found = dense(knots(pair(), weights=[1.0, 1.0], op=KEEP_ALL))
    np.testing.assert_allclose(found, wanted, atol=6e-5)
    first, second = matrices(pair())
    assert not first[:, 1].any()
    np.testing.assert_allclose(found[:, 1], second[:, 1], atol=1e-14)


def test_noise_in_the_coordinates_is_what_moves_the_second_column() -> None:
    first, second = matrices(pair())
    U = joint_frame(np.concatenate([first, second], 1))
    items = [U.T @ first, U.T @ second]
    exact = [np.where(np.abs(Z) < 1e-12, 0.0, Z) for Z in items]
    np.testing.assert_allclose(
        U @ ties_by_hand(exact, [1, 1], 1.0),
        dense(knots(pair(), weights=[1.0, 1.0], op=KEEP_ALL)),
        atol=1e-12,
    )
    noisy = [exact[0].copy(), exact[1]]
    signs = np.array(list(itertools.product([-1, 1], repeat=3)))
    columns = []
    for sign in signs:
        noisy[0][:, 1] = 1e-16 * sign
        columns.append((U @ ties_by_hand(noisy, [1, 1], 1.0))[:, 1])
    assert min(np.abs(c - [-1.0071, 0.9845, 0.0624]).max() for c in columns) < 1e-4


def test_other_methods_on_three_by_three_matrices() -> None:
    weights = [1.0, 1.0]
    singular_vectors = [
        [1.0546, -0.0065, 1.9761],
        [1.7453, -0.0070, 3.1714],
        [3.3279, 0.2945, -2.1544],
    ]
    isotropic = [[0.5483, -2.3453, 2.3021], [1.7731, 2.1762, 1.7947], [2.7670, -0.9298, -1.6063]]
    for space in ("knots", "knots-rows", "core"):
        tsv = lifted(get_method("tsv-m"), pair(), weights=weights, space=space)
        iso = lifted(get_method("iso-c"), pair(), weights=weights, space=space)
        np.testing.assert_allclose(dense(tsv), singular_vectors, atol=1e-4)
        np.testing.assert_allclose(dense(iso), isotropic, atol=6e-5)


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("concatenate", ["columns", "rows"])
@pytest.mark.parametrize("ranks", [(2, 5), (1, 1), (8, 7)])
def test_knots_ties_equals_the_oracle(ranks, concatenate, density) -> None:
    factors, weights = random_pair(ranks), [1.0, -0.7]
    D = matrices(factors)
    turned = D if concatenate == "columns" else [each.T for each in D]
    U = joint_frame(np.concatenate(turned, 1))
    wanted = U @ ties_by_hand([U.T @ each for each in turned], weights, density)
    op = {"method": "ties", "density": density}
    found = dense(knots(factors, weights=weights, op=op, concatenate=concatenate))
    np.testing.assert_allclose(
        found, wanted if concatenate == "columns" else wanted.T, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_core_ties_equals_the_oracle(density) -> None:
    factors, weights = random_pair(), [1.0, 0.5]
    D = matrices(factors)
    left, right = [], []
    for factor, each in zip(factors, D, strict=True):
        U, s, Vh = np.linalg.svd(each)
        r = factor.rank
        left.append(U[:, :r] * np.sqrt(s[:r]))
        right.append(Vh[:r].T * np.sqrt(s[:r]))
    U, V = (joint_frame(np.concatenate(blocks, 1)) for blocks in (left, right))
    wanted = U @ ties_by_hand([U.T @ each @ V for each in D], weights, density) @ V.T
    op = {"method": "ties", "density": density}
    np.testing.assert_allclose(dense(core(factors, weights=weights, op=op)), wanted, atol=1e-10)


LINEAR = [("task-arithmetic", {}), ("task-arithmetic", {"scale": 0.3, "normalize": True})]


@pytest.mark.parametrize(("name", "settings"), LINEAR)
@pytest.mark.parametrize("ranks", [(2, 5), (9, 12)])
def test_a_linear_op_gives_what_it_gives_without_coordinates(name, settings, ranks) -> None:
    factors, weights = random_pair(ranks), [1.0, -0.5]
    scale = settings.get("scale", 1.0) / (sum(weights) if settings.get("normalize") else 1.0)
    total = scale * sum(w * D for w, D in zip(weights, matrices(factors), strict=True))
    op = {"method": name, **settings}
    merged = [
        knots(factors, weights=weights, op=op),
        knots(factors, weights=weights, op=op, concatenate="rows"),
        core(factors, weights=weights, op=op),
    ]
    for each in merged:
        np.testing.assert_allclose(dense(each), total, atol=1e-12 * np.abs(total).max() * 10)


def tsv_of_factors(D, ranks):
    """Task singular vectors of matrices of known ranks, none of them cut off."""

    def polar(M):
        U, _, Vh = np.linalg.svd(M, full_matrices=False)
        return U @ Vh

    parts = [np.linalg.svd(each, full_matrices=False) for each in D]
    U = polar(np.concatenate([u[:, :r] for (u, _, _), r in zip(parts, ranks, strict=True)], 1))
    V = polar(np.concatenate([v[:r].T for (_, _, v), r in zip(parts, ranks, strict=True)], 1))
    S = np.concatenate([s[:r] for (_, s, _), r in zip(parts, ranks, strict=True)])
    return (U * S) @ V.T


@pytest.mark.parametrize("ranks", [(3, 3), (1, 7), (2, 5), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tsv_keeps_every_rank_of_every_adapter(ranks, dtype) -> None:
    factors = random_pair(ranks, rows=16, columns=11)
    wanted = tsv_of_factors(matrices(factors), ranks)
    given = [factor.to(dtype) for factor in factors]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for merged in (
        core(given, weights=[1.0, 1.0]),
        knots(given, weights=[1.0, 1.0], op="tsv-m"),
        lifted(get_method("tsv-m"), given, weights=[1.0, 1.0]),
    ):
        np.testing.assert_allclose(dense(merged), wanted, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 4])
def test_one_adapter_in_core_coordinates_is_itself(rank) -> None:
    only = random_pair((rank,))
    for op in (KEEP_ALL, "tsv-m", "task-arithmetic"):
        np.testing.assert_allclose(
            dense(core(only, weights=[1.0], op=op)), matrices(only)[0], atol=1e-12
        )


def test_core_runs_the_method_of_task_vectors_even_if_it_merges_factors_itself(monkeypatch) -> None:
    """task-arithmetic has a face for factors; in core coordinates its function must be called."""
    seen = []
    method = get_method("task-arithmetic")

    @functools.wraps(method.function)
    def spy(base, deltas, **settings):
        seen.extend(tuple(delta.shape) for delta in deltas)
        return method.function(base, deltas, **settings)

    watched = dataclasses.replace(method, function=spy)
    monkeypatch.setitem(registry._REGISTRY, "task-arithmetic", watched)
    core(random_pair((2, 5)), weights=[1.0, 1.0], op="task-arithmetic")
    assert seen == [(7, 7), (7, 7)]


@pytest.mark.parametrize("space", ["knots", "knots-rows", "core"])
def test_coordinates_lose_nothing(space) -> None:
    factors = random_pair((3, 1))
    common = coordinates(factors, space)
    for Z, D in zip(common.items, matrices(factors), strict=True):
        np.testing.assert_allclose(dense(common.back(Z)), D, atol=1e-12)
    sizes = {"knots": (4, 9), "knots-rows": (4, 12), "core": (4, 4)}
    assert {tuple(Z.shape) for Z in common.items} == {sizes[space]}


@pytest.mark.parametrize("space", ["knots", "knots-rows", "core"])
def test_factors_of_the_same_changes_give_the_same_merge(space) -> None:
    """How a change is split over B and A does not matter, nor by how much."""
    factors = random_pair((2, 3))
    torch.manual_seed(1)
    mixed = []
    for factor in factors:
        M = torch.randn(factor.rank, factor.rank, dtype=torch.float64)
        mixed.append(Factors(7 * factor.B @ M, torch.linalg.solve(M, factor.A) / 7))
    method, given = get_method("ties"), {"weights": [1.0, 1.0], "space": space, "density": 0.5}
    np.testing.assert_allclose(
        dense(lifted(method, mixed, **given)), dense(lifted(method, factors, **given)), atol=1e-9
    )


def test_every_additive_method_runs_in_core_coordinates() -> None:
    factors = random_pair((2, 3))
    names = [name for name, m in all_methods().items() if "additive" in m.laws]
    assert {"ties", "dare", "iso-cts"} <= set(names)
    for name in names:
        draws = Draws(0, "core", "w", ["a", "b"])
        merged = core(factors, weights=[1.0, 1.0], op=name, draws=draws)
        assert np.isfinite(dense(merged)).all()
        assert np.linalg.matrix_rank(dense(merged), tol=1e-9) <= 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("space", ["knots", "knots-rows", "core"])
def test_adapters_that_have_nothing_in_common_do_not_outvote_each_other(space, dtype) -> None:
    """Where a model's coordinate is zero but for rounding, the other alone decides."""
    first, second = random_pair((2, 3))
    first.B[6:], second.B[:6], first.A[:, 4:], second.A[:, :4] = 0, 0, 0, 0
    factors = [first.to(dtype), second.to(dtype)]
    found = lifted(get_method("ties"), factors, weights=[1.0, 1.0], space=space, density=1.0)
    total = sum(matrices([first, second]))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(dense(found), total, atol=tolerance)
