"""Polar factors: every method against a float64 SVD, singular and hostile input, coefficients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError, UnknownNameError
from orthomerge.linalg import polar_factor
from orthomerge.linalg.polar_iterations import quintic, quintic_coefficients

METHODS = ("auto", "svd", "eigh", "newton", "qdwh", "quintic")
DTYPES = (torch.float32, torch.float64)


def conditioned(n: int, kappa: float, seed: int, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return matrices of condition ``kappa`` and their polar factors, from their construction."""
    rs = np.random.RandomState(seed)
    U, V = (np.linalg.qr(rs.standard_normal((count, n, n)))[0] for _ in range(2))
    s = np.geomspace(1.0, 1.0 / kappa, n)
    return (U * s) @ V.swapaxes(-1, -2), U @ V.swapaxes(-1, -2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 24), st.floats(1.0, 100.0), st.integers(0, 999), st.floats(-12, 12))
def test_every_method_agrees_with_the_svd(method, dtype, n, kappa, seed, exponent) -> None:
    """P15, at any size of the entries."""
    M, expected = conditioned(n, kappa, seed)
    given_ = torch.from_numpy(M * 10.0**exponent).to(dtype)
    R, report = polar_factor(given_, method)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5
    assert R.dtype == dtype
    assert np.abs(R.double().numpy() - expected).max() < tolerance
    assert report.residual < (1e-14 if dtype == torch.float64 else 1e-6)
    assert report.fallbacks == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_matrix_ends_in_one_of_its_polar_factors(method, dtype) -> None:
    M, _ = conditioned(12, 10, 3)
    M[0, :, 4:9] = 0
    M[1] = M[1] @ np.diag([1.0] * 7 + [0.0] * 5) @ M[1]
    R, report = polar_factor(torch.from_numpy(M).to(dtype), method)
    H = R.double().mT @ torch.from_numpy(M)
    small = 1e-5 if dtype == torch.float32 else 1e-13
    assert float((R.double().mT @ R.double() - torch.eye(12)).abs().max()) < small
    assert float((H - H.mT).abs().max()) < small
    assert float(torch.linalg.eigvalsh((H + H.mT) / 2).min()) > -small
    if method in ("auto", "eigh", "quintic"):
        assert report.fallbacks == 2


def test_only_the_matrices_that_failed_are_done_again() -> None:
    good, expected = conditioned(8, 5, 1, 1)
    M = torch.from_numpy(np.concatenate([good, np.zeros((1, 8, 8))]))
    R, report = polar_factor(M, "quintic")
    assert report.fallbacks == 1
    assert np.allclose(R[0].numpy(), expected[0], atol=1e-13)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 7, 2), (1, 5), (5, 1), (2, 3, 1, 1)])
def test_rectangular_matrices(shape) -> None:
    M = torch.from_numpy(np.random.RandomState(5).standard_normal(shape))
    R, report = polar_factor(M, "qdwh")
    U, _, Vh = np.linalg.svd(M.numpy(), full_matrices=False)
    assert np.allclose(R.numpy(), U @ Vh, atol=1e-13)
    assert report.residual < 1e-14


@pytest.mark.parametrize("method", METHODS)
def test_ill_conditioned_float32_stays_orthogonal(method) -> None:
    M, _ = conditioned(40, 1e9, 2)
    R, report = polar_factor(torch.from_numpy(M).float(), method)
    assert report.residual < 1e-6
    G = R.double().mT @ R.double() - torch.eye(40, dtype=torch.float64)
    assert float(torch.linalg.vector_norm(G, dim=(-2, -1)).max()) / math.sqrt(40) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_tied_singular_values_and_orthogonal_input(method) -> None:
    Q = np.linalg.qr(np.random.RandomState(1).standard_normal((10, 10)))[0]
    R, _ = polar_factor(torch.from_numpy(3 * Q), method)
    assert np.allclose(R.numpy(), Q, atol=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        polar_factor(torch.full((3, 3), value))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="quintic"):
        polar_factor(torch.eye(2), "quintc")  # type: ignore[arg-type]


def test_inputs_are_not_changed_and_half_precision_is_lifted() -> None:
    M = torch.tensor([[0.0, 2.0], [-3.0, 0.0]], dtype=torch.bfloat16)
    before = M.clone()
    assert polar_factor(M)[0].dtype == torch.float32
    assert torch.equal(M, before)
    assert polar_factor(torch.zeros(0, 3, 3))[0].shape == (0, 3, 3)


@pytest.mark.parametrize("lower", [0.5, 1e-3, 1e-7])
def test_quintics_bring_the_interval_to_one_and_equioscillate(lower) -> None:
    steps = quintic_coefficients(lower)
    x = np.geomspace(lower, 1.0, 20001)
    # Reference for the first step: its error is the best that any odd quintic reaches.
    a, b, c = steps[0]
    first = a * x + b * x**3 + c * x**5
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    assert np.abs(x - 1).max() < 1e-3
    if lower == 0.5:  # no safety factor there: four extrema of equal size
        error = np.abs(first - 1)
        peaks = [error[0], *error[1:-1][(error[1:-1] > error[:-2]) & (error[1:-1] > error[2:])]]
        assert np.allclose([*peaks, error[-1]], error.max(), rtol=1e-4)
        assert len(peaks) == 3


def test_the_quintic_iteration_needs_no_fallback_in_float32_at_1e4() -> None:
    """Without the safety factor it leaves its interval in float32."""
    M, expected = conditioned(64, 1e4, 0, 1)
    R = quintic(torch.from_numpy(M).float())
    assert np.abs(R.double().numpy() - expected).max() < 1e-4
