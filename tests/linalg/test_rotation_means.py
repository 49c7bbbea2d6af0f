"""The Karcher mean: optimality, group laws, the geodesic between two, no unique mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import exp_so, karcher_mean, orthogonality

seeds = st.integers(0, 999)
weight_lists = st.lists(st.floats(0.1, 5), min_size=4, max_size=4)


def rotations(seed: int, count: int, size: int, angle: float) -> torch.Tensor:
    """Return rotations by at most ``angle`` in all planes together, about a random one."""
    generator = torch.Generator().manual_seed(seed)
    L = torch.randn(count + 1, size, size, generator=generator, dtype=torch.float64)
    L = L - L.mT
    R = exp_so(L * angle * math.sqrt(2) / torch.linalg.matrix_norm(L)[:, None, None])
    return R[-1] @ R[:-1]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


@settings(max_examples=20)
@given(seeds, st.integers(2, 8), st.floats(0.01, 1.5), st.floats(0, 1))
def test_two_rotations_meet_on_the_geodesic(
    seed: int, size: int, angle: float, share: float
) -> None:
    one, other = rotations(seed, 2, size, angle / 2)
    step = scipy.linalg.expm(share * scipy.linalg.logm((one.mT @ other).numpy()).real)
    found, report = karcher_mean(torch.stack([one, other]), [1 - share, share])
    close(found, one @ torch.from_numpy(step))
    assert report.converged
    assert orthogonality(found)[0]


@settings(max_examples=20)
@given(seeds, st.integers(2, 7), weight_lists)
def test_seen_from_another_frame_it_is_the_same(seed: int, size: int, weights: list[float]) -> None:
    Rs, frames = rotations(seed, 4, size, 1.2), rotations(seed + 1, 2, size, 2.0)
    R, _ = karcher_mean(Rs, weights)
    P, Q = frames
    close(karcher_mean(P @ Rs @ Q, weights)[0], P @ R @ Q)
    close(karcher_mean(Rs.mT, weights)[0], R.mT)
    order = [2, 0, 3, 1]
    close(karcher_mean(Rs[order], [weights[i] for i in order])[0], R)
    close(karcher_mean(Rs, [10 * weight for weight in weights])[0], R)


@settings(max_examples=10)
@given(seeds, weight_lists)
def test_the_mean_log_vanishes_and_no_neighbour_is_better(seed: int, weights: list[float]) -> None:
    Rs = rotations(seed, 4, 4, 1.3)
    R, report = karcher_mean(Rs, weights)

    def logs(X: torch.Tensor) -> list[np.ndarray]:
        return [scipy.linalg.logm((X.mT @ Y).numpy()).real for Y in Rs]

    def cost(X: torch.Tensor) -> float:
        return sum(w * np.sum(L**2) for w, L in zip(weights, logs(X), strict=True))

    mean = sum(w * L for w, L in zip(weights, logs(R), strict=True)) / sum(weights)
    np.testing.assert_allclose(mean, np.zeros((4, 4)), atol=1e-11)
    assert report.spread == pytest.approx(max(np.linalg.norm(L) for L in logs(R)) / math.sqrt(2))
    for neighbour in rotations(seed + 5, 3, 4, 0.02):
        shift = neighbour @ rotations(seed + 5, 3, 4, 0.02)[0].mT
        if float((shift - torch.eye(4)).norm()) > 1e-6:
            assert cost(R @ shift) > cost(R)


def test_commuting_rotations_average_in_angle() -> None:
    L = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    Rs = exp_so(torch.stack([0.2 * L, 0.9 * L, -1.1 * L]))
    close(karcher_mean(Rs, [0.5, 0.3, 0.2])[0], exp_so((0.1 + 0.27 - 0.22) * L))


def test_batches_are_means_of_their_own() -> None:
    Rs = torch.stack([rotations(seed, 3, 5, 1.0) for seed in range(4)], dim=1).reshape(
        3, 2, 2, 5, 5
    )
    found, _ = karcher_mean(Rs, [1, 2, 3])
    close(found[1, 0], karcher_mean(Rs[:, 1, 0], [1, 2, 3])[0])


def test_one_rotation_and_equal_rotations_are_themselves() -> None:
    R = rotations(0, 1, 6, 2.5)
    close(karcher_mean(R)[0], R[0], 1e-14)
    found, report = karcher_mean(R.expand(3, -1, -1))
    close(found, R[0], 1e-14)
    assert report.spread < 1e-13
    away = -torch.eye(6, dtype=torch.float64)[None] @ R
    close(karcher_mean(torch.cat([R, away]), [1, 0])[0], R[0], 1e-14)


def test_float32_gives_the_mean_of_the_rounded_rotations() -> None:
    Rs = rotations(0, 3, 16, 1.0)
    found, report = karcher_mean(Rs.float())
    assert found.dtype == torch.float32
    assert report.converged
    close(found.double(), karcher_mean(Rs)[0], 5e-7)


def test_too_few_iterations_are_reported() -> None:
    Rs = rotations(0, 3, 6, 1.4)
    _, report = karcher_mean(Rs, max_iterations=1)
    assert (report.converged, report.iterations) == (False, 1)
    assert report.residual > 1e-12
    _, report = karcher_mean(Rs, tolerance=1e-3)
    assert report.converged
    assert report.iterations < karcher_mean(Rs)[1].iterations


def test_rotations_half_a_turn_apart_have_no_mean() -> None:
    L = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(NumericalError, match="no unique mean"):
        karcher_mean(exp_so(torch.stack([0 * L, math.pi * L])), [0.7, 0.3])


def test_reflections_and_bad_weights_are_refused() -> None:
    Rs = rotations(0, 2, 3, 1.0)
    with pytest.raises(NumericalError, match="no rotation"):
        karcher_mean(torch.stack([Rs[0], -Rs[0]]), [0.8, 0.2])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(NumericalError, match="weight"):
            karcher_mean(Rs, weights)
