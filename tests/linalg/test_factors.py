"""Low-rank factors against the dense matrices they stand for: sums, norms, truncation, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import (
    Factors,
    balanced,
    balancing,
    concatenated,
    singular_values,
    truncated,
)

DTYPES = (torch.float32, torch.float64)
sizes = st.integers(1, 12)
ranks = st.integers(1, 16)  # above min(o, n) as well
seeds = st.integers(0, 999)


def factors(o, n, r, *, seed=0, dtype=torch.float64, batch=()) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(*batch, o, r, generator=generator, dtype=torch.float64)
    A = torch.randn(*batch, r, n, generator=generator, dtype=torch.float64)
    return Factors(B.to(dtype), A.to(dtype))


def product(F: Factors) -> np.ndarray:
    return F.B.double().numpy() @ F.A.double().numpy()


def best(X: np.ndarray, rank: int) -> np.ndarray:
    U, s, Vh = np.linalg.svd(X, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, ranks, st.integers(1, 16), seeds, st.sampled_from(DTYPES))
def test_truncation_is_the_dense_one(o, n, r, rank, seed, dtype) -> None:
    F = factors(o, n, r, seed=seed, dtype=dtype)
    X = product(F)
    found = truncated(F, rank)
    assert found.rank == min(rank, r, o, n)
    assert found.B.dtype == dtype
    s = np.append(np.linalg.svd(X, compute_uv=False), 0.0)
    gap = (s[rank - 1] - s[rank]) / s[0] if rank < len(s) else 1.0
    tolerance = (1e-10 if dtype == torch.float64 else 1e-5) * s[0]
    error = np.linalg.norm(X - product(found), 2)
    assert abs(error - (s[rank] if rank < min(o, n) else 0.0)) < tolerance  # Eckart-Young
    if gap > 1e-3:  # else the best approximation is hardly determined
        np.testing.assert_allclose(product(found), best(X, rank), atol=tolerance / gap)


def test_truncation_at_the_size_of_an_adapter() -> None:
    F = factors(60, 45, 12, seed=3)
    for rank in (1, 5, 12, 40):
        error = np.abs(product(truncated(F, rank)) - best(product(F), rank)).max()
        assert error <= 1e-10


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, ranks, seeds, st.sampled_from(DTYPES))
def test_balancing_loses_nothing_and_shares_evenly(o, n, r, seed, dtype) -> None:
    F = factors(o, n, r, seed=seed, dtype=dtype)
    found = balanced(F)
    X, tolerance = product(F), 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(product(found), X, atol=tolerance * np.linalg.norm(X))
    left = found.B.double().numpy().T @ found.B.double().numpy()
    right = found.A.double().numpy() @ found.A.double().numpy().T
    S = np.linalg.svd(X, compute_uv=False)[: found.rank]
    np.testing.assert_allclose(left, np.diag(S), atol=tolerance * 10 * S[0])
    np.testing.assert_allclose(right, np.diag(S), atol=tolerance * 10 * S[0])


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, ranks, seeds, st.sampled_from(DTYPES))
def test_singular_values_are_the_dense_ones(o, n, r, seed, dtype) -> None:
    F = factors(o, n, r, seed=seed, dtype=dtype)
    wanted = np.linalg.svd(product(F), compute_uv=False)[: min(r, o, n)]
    found = singular_values(F)
    assert found.dtype == torch.float64
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(found.numpy(), wanted, atol=tolerance * max(wanted[0], 1.0))


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.lists(st.tuples(ranks, st.floats(-3, 3)), min_size=1, max_size=4), seeds)
def test_concatenation_is_the_weighted_sum(o, n, parts, seed) -> None:
    each = [factors(o, n, r, seed=seed + i) for i, (r, _) in enumerate(parts)]
    weights = [w for _, w in parts]
    found = concatenated(each, weights)
    assert found.rank == sum(r for r, _ in parts)
    wanted = sum(w * product(F) for F, w in zip(each, weights, strict=True))
    np.testing.assert_allclose(product(found), wanted, atol=1e-12)
    np.testing.assert_allclose(product(concatenated(each)), sum(map(product, each)), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, ranks, ranks, seeds, st.sampled_from(DTYPES))
def test_norms_and_inner_products_are_the_dense_ones(o, n, r, other, seed, dtype) -> None:
    F, F2 = factors(o, n, r, seed=seed, dtype=dtype), factors(o, n, other, seed=-1 - seed)
    X, Y = product(F), product(F2)
    atol = 1e-10 if dtype == torch.float64 else 1e-5
    assert float(F.norm()) == pytest.approx(np.linalg.norm(X), abs=atol)
    assert float(F.inner(F2)) == pytest.approx((X * Y).sum(), abs=1e-9)
    np.testing.assert_allclose(F.column_norms().numpy(), np.linalg.norm(X, axis=0), atol=atol * 9)
    np.testing.assert_allclose(F.row_norms().numpy(), np.linalg.norm(X, axis=1), atol=atol * 9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_matrices_one_by_one(dtype) -> None:
    F = factors(9, 7, 3, dtype=dtype, batch=(2, 3))
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    for batch, each in (
        (truncated(F, 2).dense(), lambda one: truncated(one, 2).dense()),
        (balanced(F).dense(), lambda one: balanced(one).dense()),
        (singular_values(F), singular_values),
        (F.norm(), Factors.norm),
        (F.column_norms(), Factors.column_norms),
        (concatenated([F, F], [1.0, 2.0]).dense(), lambda one: 3 * one.dense()),
        (F.scaled(F.norm()).dense(), lambda one: float(one.norm()) * one.dense()),
    ):
        for i in range(2):
            for j in range(3):
                one = each(Factors(F.B[i, j], F.A[i, j]))
                torch.testing.assert_close(
                    batch[i, j].double(), one.double(), rtol=tolerance, atol=tolerance * 30
                )


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_very_different_scales_lose_nothing(dtype) -> None:
    """One column a million times longer than another says nothing of its part of the product."""
    F = factors(8, 8, 4, seed=1, dtype=dtype)
    by = torch.tensor([1e-6, 1e3, 1.0, 1e6], dtype=dtype)
    G = Factors(F.B * by, F.A / by[:, None])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(product(balanced(G)), product(F), atol=10 * tolerance)
    wanted = np.linalg.svd(product(F), compute_uv=False)[:4]
    np.testing.assert_allclose(singular_values(G).numpy(), wanted, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 12), st.integers(3, 12), st.integers(1, 3), seeds)
def test_balancing_from_gram_matrices_is_balancing(o, n, r, seed) -> None:
    F = factors(o, n, r, seed=seed)
    F.A[0] *= 1e4  # columns and rows of very different lengths
    F.B[:, 0] *= 1e-3
    X, Y, S = balancing(F.B.mT @ F.B, F.A @ F.A.mT)
    found = Factors(F.B @ X, Y @ F.A)
    size = np.linalg.norm(product(F), 2)
    np.testing.assert_allclose(product(found), product(F), atol=1e-10 * size)
    np.testing.assert_allclose((found.B.mT @ found.B).numpy(), np.diag(S), atol=1e-6 * size)
    np.testing.assert_allclose((found.A @ found.A.mT).numpy(), np.diag(S), atol=1e-6 * size)
    wanted = np.linalg.svd(product(F), compute_uv=False)[:r]
    np.testing.assert_allclose(S.numpy(), wanted, atol=1e-8 * size)


def test_balancing_drops_what_gram_matrices_do_not_resolve() -> None:
    F = factors(8, 7, 2)
    twice = concatenated([F, F])
    X, Y, S = balancing(twice.B.mT @ twice.B, twice.A @ twice.A.mT)
    assert not S[2:].any()
    assert not X[:, 2:].any()
    assert not Y[2:].any()
    torch.testing.assert_close(twice.B @ X @ Y @ twice.A, 2 * F.dense(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_deficient_factors(dtype) -> None:
    zero = Factors(torch.zeros(5, 3, dtype=dtype), torch.randn(3, 4).to(dtype))
    assert not truncated(zero, 2).dense().any()
    assert not singular_values(zero).any()
    assert float(zero.norm()) == 0.0
    F = factors(6, 5, 2, dtype=dtype)
    opposite = concatenated([F, F], [1.0, -1.0])
    assert not balanced(opposite).dense().any()
    assert not singular_values(opposite).any()
    twice = concatenated([F, F])
    assert (singular_values(twice)[2:] == 0).all()
    atol = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(truncated(twice, 2).dense(), 2 * F.dense(), atol=atol, rtol=0)
    empty = Factors(torch.zeros(5, 0, dtype=dtype), torch.zeros(0, 4, dtype=dtype))
    assert balanced(empty).rank == 0
    assert not truncated(empty, 1).dense().any()
    assert float(empty.norm()) == 0.0


def test_half_precision_is_lifted_and_inputs_are_left_alone() -> None:
    F = factors(6, 5, 2).to(torch.bfloat16)
    lifted = F.to(torch.float32)
    for function in (balanced, lambda X: truncated(X, 1)):
        torch.testing.assert_close(function(F).dense(), function(lifted).dense())
        assert function(F).B.dtype == torch.float32
    assert F.B.dtype == torch.bfloat16
    assert torch.equal(F.dense(), lifted.dense())


def test_turning_is_transposition() -> None:
    F = factors(6, 5, 2, batch=(2,))
    torch.testing.assert_close(F.turned().dense(), F.dense().mT)
    assert F.turned().shape == (5, 6)


@pytest.mark.parametrize("function", [balanced, singular_values, lambda F: truncated(F, 1)])
@pytest.mark.parametrize("side", ["B", "A"])
def test_factors_that_are_not_finite_are_refused(function, side) -> None:
    F = factors(4, 4, 2, dtype=torch.float32)
    getattr(F, side)[1, 1] = float("nan")
    with pytest.raises(NumericalError, match="factor is not finite"):
        function(F)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(NumericalError, match="do not fit"):
        Factors(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(NumericalError, match="do not fit"):
        Factors(torch.ones(2), torch.ones(2))
    with pytest.raises(NumericalError, match="at least 1"):
        truncated(factors(3, 3, 2), 0)
    with pytest.raises(NumericalError, match="one shape"):
        concatenated([factors(3, 3, 2), factors(3, 4, 2)])
    with pytest.raises(NumericalError, match="one shape"):
        concatenated([])
    with pytest.raises(NumericalError, match="one weight"):
        concatenated([factors(3, 3, 2)], [1.0, 1.0])
