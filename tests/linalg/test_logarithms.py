"""Exponential, logarithm, angles and the two charts: against scipy and numpy, and round trips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import (
    cayley,
    cayley_angles,
    cayley_from_log,
    exp_so,
    inverse_cayley,
    log_from_cayley,
    log_so,
    merge_algebra,
    orthogonality,
    rotation_angles,
    skewness,
)

DTYPES = (torch.float32, torch.float64)
sizes = st.integers(2, 24)
angles = st.floats(1e-6, 3.0)
seeds = st.integers(0, 999)
dtypes = st.sampled_from(DTYPES)


def skew_with_angle(
    size: int, angle: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> torch.Tensor:
    """Return two random skew matrices with the largest singular value ``angle``."""
    generator = torch.Generator().manual_seed(seed)
    L = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    L = L - L.mT
    return (L * angle / torch.linalg.matrix_norm(L, 2)[:, None, None]).to(dtype)


def planar(*rotations: float) -> torch.Tensor:
    """Return the logarithm that turns the k-th pair of axes by the k-th angle."""
    blocks = [torch.tensor([[0.0, phi], [-phi, 0.0]], dtype=torch.float64) for phi in rotations]
    return torch.block_diag(*blocks)


def turned(L: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Conjugate by a random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(L.shape, generator=generator, dtype=L.dtype))[0]
    return Q @ L @ Q.mT


def norm(X: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(X.double(), 2).max())


@settings(max_examples=30)
@given(sizes, st.floats(1e-6, 20.0), seeds)
def test_exponential_is_scipys(size: int, angle: float, seed: int) -> None:
    L = skew_with_angle(size, angle, seed=seed)
    expected = np.stack([scipy.linalg.expm(X) for X in L.numpy()])
    np.testing.assert_allclose(exp_so(L).numpy(), expected, atol=1e-14 * max(20, angle**2))


@settings(max_examples=30)
@given(sizes, st.floats(1e-3, 3.0), seeds)
def test_logarithm_is_scipys(size: int, angle: float, seed: int) -> None:
    R = exp_so(skew_with_angle(size, angle, seed=seed))
    expected = np.stack([scipy.linalg.logm(X).real for X in R.numpy()])
    np.testing.assert_allclose(log_so(R).numpy(), expected, atol=1e-12)


@settings(max_examples=40)
@given(sizes, angles, seeds, dtypes)
def test_round_trips(size: int, angle: float, seed: int, dtype: torch.dtype) -> None:
    """P8, with the amplification phi / sin phi that the storage of R brings near pi."""
    L = skew_with_angle(size, angle, dtype, seed)
    R = exp_so(L)
    back = log_so(R)
    assert (R.dtype, back.dtype) == (dtype, dtype)
    assert skewness(back) == (True, 0.0)
    assert orthogonality(R)[0]
    assert bool((torch.linalg.det(R) > 0).all())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert norm(exp_so(back) - R) < tolerance
    assert norm(back - L) < 20 * math.sqrt(size) * torch.finfo(dtype).eps * angle
    assert norm(log_from_cayley(cayley_from_log(L)) - L) < tolerance * angle


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_angles_keep_their_relative_accuracy(dtype: torch.dtype) -> None:
    L = skew_with_angle(48, 1e-6, dtype)
    tolerance = 50 * torch.finfo(dtype).eps
    assert norm(log_so(exp_so(L)) - L) < tolerance * 1e-6
    assert norm(exp_so(L) - torch.eye(48, dtype=dtype) - L) < 1e-12
    expected = torch.linalg.svdvals(L.double())[:, ::2]
    assert float((rotation_angles(exp_so(L)) - expected).abs().max()) < tolerance * 1e-6


@settings(max_examples=30)
@given(sizes, st.floats(1e-3, 3.1), seeds)
def test_angles_are_the_arguments_of_numpys_eigenvalues(size: int, angle: float, seed: int) -> None:
    L = skew_with_angle(size, angle, seed=seed)
    R = exp_so(L)
    found = np.abs(np.angle(np.linalg.eigvals(R.numpy())))
    expected = -np.sort(-found, axis=-1)[:, : 2 * (size // 2) : 2]
    np.testing.assert_allclose(rotation_angles(R).numpy(), expected, atol=1e-13)
    np.testing.assert_allclose(cayley_angles(cayley_from_log(L)).numpy(), expected, atol=1e-11)


def test_angles_small_large_and_tied_together() -> None:
    wanted = [math.pi, 3.0, 3.0, math.pi / 2, math.pi / 2, 1.0, 1e-7, 1e-7, 0.0]
    R = turned(torch.block_diag(exp_so(planar(*wanted)), torch.ones(1, 1, dtype=torch.float64)))
    np.testing.assert_allclose(rotation_angles(R).numpy(), wanted, atol=1e-14)
    # A sine of 1e-9 next to pi must not be taken for a small angle.
    R = exp_so(turned(planar(math.pi - 1e-9, 1e-5)))
    np.testing.assert_allclose(rotation_angles(R).numpy(), [math.pi - 1e-9, 1e-5], atol=1e-14)


@settings(max_examples=30)
@given(sizes, st.floats(1e-3, 3.0), seeds)
def test_charts_describe_the_same_rotation(size: int, angle: float, seed: int) -> None:
    L = skew_with_angle(size, angle, seed=seed)
    A = cayley_from_log(L)
    assert skewness(A) == (True, 0.0)
    torch.testing.assert_close(cayley(A), exp_so(L), atol=1e-12, rtol=0)
    torch.testing.assert_close(A, inverse_cayley(exp_so(L)), atol=1e-10, rtol=0)


@settings(max_examples=20)
@given(sizes, st.floats(1e-3, 3.0), seeds)
def test_inverse_and_change_of_basis(size: int, angle: float, seed: int) -> None:
    L = skew_with_angle(size, angle, seed=seed)
    torch.testing.assert_close(log_so(exp_so(L).mT), -L, atol=1e-12, rtol=0)
    torch.testing.assert_close(exp_so(L) @ exp_so(L), exp_so(2 * L), atol=1e-12, rtol=0)
    Q = torch.linalg.qr(skew_with_angle(size, 1.0, seed=seed + 1) + torch.eye(size))[0]
    turned_log = log_so(Q @ exp_so(L) @ Q.mT)
    torch.testing.assert_close(turned_log, Q @ L @ Q.mT, atol=1e-12, rtol=0)


def test_oracle_o5_angles_in_one_plane() -> None:
    """The charts average 0.2 and 0.6 rad differently; only the logarithm's mean is 0.4."""
    L = torch.stack([turned(planar(phi, 0.0)) for phi in (0.2, 0.6)])
    A = torch.stack([cayley_from_log(X) for X in L])
    by_log, _ = merge_algebra(log_so(exp_so(L)), [1, 1])
    assert rotation_angles(exp_so(by_log))[0].item() == pytest.approx(0.4, abs=1e-14)
    by_cayley, _ = merge_algebra(A, [1, 1])
    assert cayley_angles(by_cayley)[0].item() == pytest.approx(0.4040813770100249, abs=1e-14)


def test_oracle_o5_disjoint_planes() -> None:
    A = torch.stack([cayley_from_log(planar(0.4, 0.0)), cayley_from_log(planar(0.0, 0.4))])
    merged, info = merge_algebra(A, [1, 1])
    assert info.factors == pytest.approx([math.sqrt(2)], abs=1e-15)
    expected = [0.2847358216066036] * 2
    assert rotation_angles(cayley(merged)).tolist() == pytest.approx(expected, abs=1e-14)


@settings(max_examples=20)
@given(st.lists(st.floats(-1.5, 1.5), min_size=6, max_size=6), st.floats(0.1, 0.9), seeds)
def test_commuting_rotations_average_in_angle(phis: list[float], share: float, seed: int) -> None:
    """P17."""
    one, other = turned(planar(*phis[:3]), seed), turned(planar(*phis[3:]), seed)
    logs = torch.stack([log_so(exp_so(one)), log_so(exp_so(other))])
    merged, _ = merge_algebra(logs, [share, 1 - share], correction="none")
    means = [share * a + (1 - share) * b for a, b in zip(phis[:3], phis[3:], strict=True)]
    expected = sorted((abs(mean) for mean in means), reverse=True)
    assert rotation_angles(exp_so(merged)).tolist() == pytest.approx(expected, abs=1e-12)


REFLECTION = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "R",
    [
        exp_so(turned(planar(math.pi, 0.3))),
        REFLECTION,
        turned(REFLECTION),
        torch.block_diag(REFLECTION, exp_so(planar(math.pi - 1e-6))),
        -torch.eye(4, dtype=torch.float64),
    ],
    ids=["half turn", "reflection", "turned reflection", "reflection beside near pi", "minus one"],
)
def test_no_logarithm_near_minus_one(R: torch.Tensor, dtype: torch.dtype) -> None:
    eye = torch.eye(R.shape[-1], dtype=dtype)
    with pytest.raises(NumericalError, match="near -1"):
        log_so(torch.stack([eye, R.to(dtype)]))


def test_float64_resolves_what_float32_refuses() -> None:
    R = exp_so(planar(3.1415))
    assert float(log_so(R)[0, 1]) == pytest.approx(3.1415, rel=1e-11)
    with pytest.raises(NumericalError, match="near -1"):
        log_so(R.float())


def test_reflections_have_no_angles_in_pairs() -> None:
    with pytest.raises(NumericalError, match="reflection"):
        rotation_angles(torch.stack([torch.eye(3, dtype=torch.float64), turned(REFLECTION)]))


@pytest.mark.parametrize("angle", [math.pi, 4.0, 3 * math.pi])
def test_the_cayley_chart_ends_at_pi(angle: float) -> None:
    with pytest.raises(NumericalError, match="at pi or beyond"):
        cayley_from_log(turned(planar(angle, 0.1)))


@pytest.mark.parametrize("function", [log_so, rotation_angles])
def test_what_is_not_orthogonal_is_refused(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NumericalError, match="not orthogonal"):
        function(torch.eye(3) + 0.1 * torch.ones(3, 3))


@pytest.mark.parametrize(
    "function", [exp_so, log_so, rotation_angles, cayley_angles, cayley_from_log, log_from_cayley]
)
def test_sizes_batches_halves_and_nan(function) -> None:  # type: ignore[no-untyped-def]
    X = torch.eye(4) if function in (log_so, rotation_angles) else torch.zeros(4, 4)
    for size in (0, 1, 3):
        out = function(X[:size, :size])
        assert out.shape[-1] == (size // 2 if "angles" in function.__name__ else size)
    assert function(X.expand(2, 3, 4, 4)).shape[:2] == (2, 3)
    assert function(X.bfloat16()).dtype in DTYPES
    with pytest.raises(NumericalError, match="not finite"):
        function(torch.full((2, 2), math.nan))
