"""The Cayley map, its inverse and PEFT's series: round trips, group laws, refusals, oracle O2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import (
    apply_cayley,
    cayley,
    cayley_neumann,
    inverse_cayley,
    orthogonality,
    skewness,
    unpack_skew,
)

DTYPES = (torch.float32, torch.float64)


def skew_with_angle(size: int, angle: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a batch of random skew matrices whose largest rotation angle is ``angle``."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    A = A - A.mT
    largest = torch.linalg.matrix_norm(A, 2)[:, None, None]
    return (A * math.tan(angle / 2) / largest).to(dtype)


sizes = st.integers(2, 24)
angles = st.floats(1e-3, 3.0)
seeds = st.integers(0, 999)


@settings(max_examples=40, deadline=None)
@given(sizes, angles, seeds, st.sampled_from(DTYPES))
def test_cayley_gives_rotations(size: int, angle: float, seed: int, dtype: torch.dtype) -> None:
    """P9."""
    R = cayley(skew_with_angle(size, angle, dtype, seed))
    orthogonal, residual = orthogonality(R)
    assert orthogonal
    assert residual < (1e-6 if dtype == torch.float32 else 1e-14)
    assert bool((torch.linalg.det(R) > 0).all())


@settings(max_examples=40, deadline=None)
@given(sizes, angles, seeds, st.sampled_from(DTYPES))
def test_inverse_cayley_round_trip(size: int, angle: float, seed: int, dtype: torch.dtype) -> None:
    """P8: both directions, angles up to 3 rad."""
    A = skew_with_angle(size, angle, dtype, seed)
    R = cayley(A)
    back = inverse_cayley(R)
    assert skewness(back) == (True, 0.0)
    # An error e in R is one of about ||A||^2 e in A near pi, so R is the fair place to compare.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert float((cayley(back) - R).abs().max()) < 4 * tolerance
    assert float((back - A).abs().max()) < tolerance * max(1.0, float(A.abs().max())) ** 2 * 4


@settings(max_examples=20, deadline=None)
@given(sizes, angles, seeds)
def test_negation_is_inversion(size: int, angle: float, seed: int) -> None:
    A = skew_with_angle(size, angle, torch.float64, seed)
    eye = torch.eye(size, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(cayley(A) @ cayley(-A), eye, atol=1e-12, rtol=0)


def test_angle_is_twice_the_arctangent() -> None:
    A = torch.tensor([[0.0, math.tan(0.3)], [-math.tan(0.3), 0.0]], dtype=torch.float64)
    assert math.acos(float(cayley(A)[0, 0])) == pytest.approx(0.6, abs=1e-15)


def test_half_precision_is_lifted() -> None:
    A = skew_with_angle(4, 1.0, torch.float32).bfloat16()
    assert torch.equal(cayley(A), cayley(A.float()))


HALF_TURN = [[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]]
REFLECTION = [[-1.0, 0.0], [0.0, 1.0]]
ALMOST = [[math.cos(3.1415), math.sin(3.1415)], [-math.sin(3.1415), math.cos(3.1415)]]


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (HALF_TURN, torch.float32),
        (HALF_TURN, torch.float64),
        (REFLECTION, torch.float32),
        (REFLECTION, torch.float64),
        (ALMOST, torch.float32),
    ],
)
def test_eigenvalues_near_minus_one_are_refused(
    rows: list[list[float]], dtype: torch.dtype
) -> None:
    R = torch.tensor(rows, dtype=dtype)
    with pytest.raises(NumericalError, match="near -1"):
        inverse_cayley(torch.stack([torch.eye(R.shape[-1], dtype=dtype), R]))


def test_float64_resolves_what_float32_refuses() -> None:
    R = torch.tensor(ALMOST, dtype=torch.float64)
    assert float(inverse_cayley(R)[0, 1]) == pytest.approx(math.tan(3.1415 / 2), rel=1e-8)


def test_a_conjugated_half_turn_is_refused() -> None:
    Q = cayley(skew_with_angle(5, 2.0, torch.float64))[0]
    R = Q @ torch.diag(torch.tensor([-1.0, -1, 1, 1, 1], dtype=torch.float64)) @ Q.T
    with pytest.raises(NumericalError, match="near -1"):
        inverse_cayley(R)


def test_many_large_angles_are_not_taken_for_a_half_turn() -> None:
    """Their Frobenius norm passes the limit that applies to the spectral norm."""
    mu = torch.full((64,), 1500.0)
    A = torch.block_diag(*(torch.tensor([[0.0, m], [-m, 0.0]]) for m in mu))
    assert bool(inverse_cayley(cayley(A)).isfinite().all())


def test_what_is_not_orthogonal_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(NumericalError, match="not orthogonal"):
        inverse_cayley(torch.eye(4) + 0.3 * torch.randn(4, 4))


@pytest.mark.parametrize("function", [cayley, inverse_cayley, lambda A: cayley_neumann(A, 5)])
def test_nan_is_refused(function) -> None:  # type: ignore[no-untyped-def]
    A = torch.zeros(2, 3, 3)
    A[1, 0, 1] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        function(A)


# Oracle O2: first row of K for the first block of O1's first adapter, from the formulas in fp64.
O2 = {
    (5, False): [0.9211862130, 0.2542786247, 0.1615778478, 0.2217871343],
    (4, False): [0.9154013098, 0.2744333940, 0.1732618275, 0.2397894352],
    (3, False): [0.9154013098, 0.2744333940, 0.1732618275, 0.2397894352],
}
O2_CAYLEY = [0.9255780499, 0.2628631994, 0.1576680968, 0.2221463104]
O2_CAYLEY_NEGATED = [0.9255780499, -0.3587181024, 0.0150587673, -0.1199992920]


@pytest.fixture
def oracle_q() -> torch.Tensor:
    return unpack_skew(torch.from_numpy(0.1 * np.random.RandomState(0).standard_normal((2, 6))))


@pytest.mark.parametrize(("terms", "legacy"), O2)
def test_oracle_o2_series(oracle_q: torch.Tensor, terms: int, legacy: bool) -> None:
    K = cayley_neumann(oracle_q, terms, legacy=legacy)
    assert K[0, 0].tolist() == pytest.approx(O2[terms, legacy], abs=1e-10)


def test_oracle_o2_exact(oracle_q: torch.Tensor) -> None:
    assert cayley(oracle_q)[0, 0].tolist() == pytest.approx(O2_CAYLEY, abs=1e-10)
    assert cayley(-oracle_q)[0, 0].tolist() == pytest.approx(O2_CAYLEY_NEGATED, abs=1e-10)


@pytest.mark.parametrize(("terms", "expected"), [(5, 0.05253285), (4, 0.00362755), (3, 0.00362755)])
def test_oracle_o2_orthogonality_error(oracle_q: torch.Tensor, terms: int, expected: float) -> None:
    K = cayley_neumann(oracle_q, terms)
    gram = torch.block_diag(*(K @ K.mT)) - torch.eye(8, dtype=torch.float64)
    assert float(torch.linalg.vector_norm(gram)) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("terms", range(0, 9))
@pytest.mark.parametrize("legacy", [False, True])
def test_series_is_its_closed_form(oracle_q: torch.Tensor, terms: int, legacy: bool) -> None:
    eye = torch.eye(4, dtype=torch.float64)
    powers = [torch.linalg.matrix_power(oracle_q, k) for k in range(10)]
    if legacy or terms < 3:
        expected = eye + 2 * sum(powers[1 : max(terms, 1)], torch.zeros_like(eye))
    else:
        expected = (eye + oracle_q) @ sum(powers[: max(3, terms - 1)], torch.zeros_like(eye))
    torch.testing.assert_close(
        cayley_neumann(oracle_q, terms, legacy=legacy),
        expected.expand_as(oracle_q),
        atol=1e-14,
        rtol=0,
    )


@settings(max_examples=20, deadline=None)
@given(sizes, st.integers(3, 9), seeds)
def test_series_differs_from_cayley_by_its_first_missing_power(
    size: int, terms: int, seed: int
) -> None:
    Q = skew_with_angle(size, 0.8, torch.float64, seed)
    m = max(3, terms - 1)
    remainder = cayley(Q) @ torch.linalg.matrix_power(Q, m)
    torch.testing.assert_close(cayley(Q) - cayley_neumann(Q, terms), remainder, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_weight_is_rotated_without_forming_the_rotation(rows: int, dtype: torch.dtype) -> None:
    A = skew_with_angle(12, 2.0, torch.float64, seed=rows)[0]
    W = torch.from_numpy(np.random.RandomState(rows).standard_normal((rows, 12)))
    eye = np.eye(12)
    expected = W.numpy() @ np.linalg.inv(eye - A.numpy()) @ (eye + A.numpy())
    rotated = apply_cayley(W.to(dtype), A.to(dtype))
    assert rotated.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert np.allclose(rotated.double().numpy(), expected, atol=tolerance)


def test_a_weight_is_rotated_block_by_block() -> None:
    A = skew_with_angle(4, 1.0, torch.float64)
    W = torch.from_numpy(np.random.RandomState(1).standard_normal((3, 5, 8)))
    expected = W @ torch.block_diag(*cayley(A))
    assert torch.allclose(apply_cayley(W, A), expected, atol=1e-13)
    with pytest.raises(NumericalError, match="fill the columns"):
        apply_cayley(W[..., :4], A)
