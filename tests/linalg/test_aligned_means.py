"""The mean of weights that differ by rotations: its laws, and what it says of hard cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import exp_so, hyperspherical_energy, karcher_mean, procrustes_mean

seeds = st.integers(0, 999)
shares = st.floats(0.05, 0.95)


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def skew(seed: int, size: int, angle: float) -> torch.Tensor:
    L = normal(seed, size, size)
    L = L - L.mT
    return L * angle / torch.linalg.matrix_norm(L, 2)


def well_conditioned(seed: int, rows: int, columns: int) -> torch.Tensor:
    """Return a weight with singular values between 1 and 2."""
    U, _, Vh = torch.linalg.svd(normal(seed, rows, columns), full_matrices=False)
    return U @ torch.diag(torch.linspace(1, 2, U.shape[1], dtype=torch.float64)) @ Vh


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


@settings(max_examples=25)
@given(seeds, st.integers(2, 9), st.integers(0, 6), st.floats(1e-3, 2.9), shares)
def test_two_models_meet_on_the_geodesic(
    seed: int, columns: int, more: int, angle: float, share: float
) -> None:
    """W and W R give W R^w, with the power from scipy; the mean has the geometry of both."""
    W, L = well_conditioned(seed, columns + more, columns), skew(seed + 1, columns, angle)
    R, part = (torch.from_numpy(scipy.linalg.expm(t * L.numpy())) for t in (1.0, share))
    C, report = procrustes_mean([W, W @ R], [1 - share, share])
    close(C, W @ part)
    close(C.norm(dim=1), W.norm(dim=1))
    close(torch.linalg.svdvals(C), torch.linalg.svdvals(W))
    largest = float(torch.linalg.matrix_norm(L, 2))
    assert report.angles == pytest.approx((share * largest, (1 - share) * largest), abs=1e-8)
    if angle > 1e-2:
        assert report.rotational_share == pytest.approx((1.0, 1.0), abs=1e-9)
    assert (report.raised, report.unrotated, report.frozen) == (0, 0, 0)


@settings(max_examples=15)
@given(seeds, st.lists(st.floats(0.1, 1), min_size=3, max_size=3), st.booleans())
def test_several_models_give_their_centre(seed: int, weights: list[float], commute: bool) -> None:
    total = sum(weights)
    if commute:
        Q = torch.linalg.qr(normal(seed, 6, 6))[0]
        plane = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        phis = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        phis = phis - torch.tensor(weights, dtype=torch.float64) @ phis / total
        rotations = [exp_so(Q @ torch.kron(torch.diag(p), plane) @ Q.mT) for p in phis]
    else:
        rotations = [exp_so(skew(seed + i, 6, 0.7)) for i in range(3)]
        mean, _ = karcher_mean(torch.stack(rotations), weights, tolerance=1e-13)
        rotations = [mean.mT @ R for R in rotations]
    C = well_conditioned(seed, 9, 6)
    found, report = procrustes_mean([C @ R for R in rotations], weights, max_sweeps=30)
    close(found, C, 1e-11)
    assert report.converged
    assert report.rotational_share == pytest.approx((1.0,) * 3, abs=1e-9)
    start, _ = procrustes_mean([C @ R for R in rotations], weights, max_sweeps=0)
    assert (start - C).norm() > 1e-6, "the sweeps are what makes it exact"


@settings(max_examples=15)
@given(seeds, st.permutations(range(4)), st.integers(2, 4), st.sampled_from([(7, 5), (4, 6)]))
def test_order_does_not_matter(
    seed: int, order: list[int], count: int, shape: tuple[int, int]
) -> None:
    """P3."""
    W = normal(seed, *shape)
    Ws = [W + 0.3 * normal(seed + i + 1, *shape) for i in range(count)]
    weights, order = [1.0, 2.0, 0.5, 1.5][:count], [i for i in order if i < count]
    one, first = procrustes_mean(Ws, weights)
    other, second = procrustes_mean([Ws[i] for i in order], [weights[i] for i in order])
    close(one, other, 1e-11)
    assert second.angles == pytest.approx([first.angles[i] for i in order], abs=1e-9)
    expected = [first.rotational_share[i] for i in order]
    assert second.rotational_share == pytest.approx(expected, abs=1e-9)


@settings(max_examples=15)
@given(seeds, st.integers(2, 3), st.floats(0.01, 100))
def test_scaling_and_orthogonal_maps_of_rows_and_columns(
    seed: int, count: int, factor: float
) -> None:
    """P4 and P5: the result moves along, both sides."""
    W = normal(seed, 7, 5)
    Ws = [W + 0.3 * normal(seed + i + 1, 7, 5) for i in range(count)]
    C, _ = procrustes_mean(Ws, [1.0] * count)
    H, G = (torch.linalg.qr(normal(seed + 9, size, size))[0] for size in (7, 5))
    moved, _ = procrustes_mean([factor * H @ X @ G for X in Ws], [1.0] * count)
    close(moved / factor, H @ C @ G, 1e-11)


@settings(max_examples=15)
@given(seeds, st.integers(2, 4))
def test_without_rotation_it_is_the_weighted_average(seed: int, count: int) -> None:
    """Models B S_i with S_i symmetric positive and commuting."""
    Q, B = torch.linalg.qr(normal(seed, 5, 5))[0], torch.linalg.qr(normal(seed + 1, 8, 5))[0]
    scales = [normal(seed + i, 5).abs() + 0.1 for i in range(count)]
    Ws = [B @ Q @ torch.diag(scale) @ Q.mT for scale in scales]
    weights = [1.0 + i for i in range(count)]
    C, report = procrustes_mean(Ws, weights)
    average = sum(w * W for w, W in zip(weights, Ws, strict=True)) / sum(weights)
    close(C, average, 1e-13)
    assert report.converged
    assert max(report.angles) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_models_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    W = normal(0, 5, 8).to(dtype)
    C, report = procrustes_mean([W, W.clone(), W.clone()], [0.1, 0.3, 0.6])
    assert C.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(C.to(dtype), W)
    assert C.data_ptr() != W.data_ptr()
    assert (report.converged, report.angles) == (True, (0.0, 0.0, 0.0))


def test_ends_of_the_path_are_the_models() -> None:
    W, other = normal(0, 4, 6), normal(1, 4, 6)
    assert torch.equal(procrustes_mean([W, other], [1.0, 0.0])[0], W)
    assert torch.equal(procrustes_mean([W, other], [0.0, 3.0])[0], other)
    nearly, _ = procrustes_mean([W, W + 0.1 * other], [1.0, 1e-9])
    close(nearly, W, 1e-7)


def test_wide_weights_turn_nothing_they_do_not_see() -> None:
    """Inputs that neither model reads stay out of the rotation; the rows' part is exact."""
    L = torch.block_diag(skew(1, 4, 0.8), torch.zeros(8, 8, dtype=torch.float64))
    Q = torch.linalg.qr(normal(2, 12, 12))[0]
    W = torch.cat([well_conditioned(0, 4, 4), torch.zeros(4, 8, dtype=torch.float64)], dim=1)
    C, report = procrustes_mean([W @ Q, W @ exp_so(L) @ Q], [0.5, 0.5])
    close(C, W @ exp_so(L / 2) @ Q)
    assert report.angles == pytest.approx((0.4, 0.4), abs=1e-10)


def test_small_updates_of_wide_weights_stay_small() -> None:
    """The null space of M, 3/4 of all directions, must not be rotated by rounding."""
    W = normal(0, 16, 64)
    for dtype in (torch.float32, torch.float64):
        Ws = [(W + 0.02 * normal(i, 16, 64)).to(dtype) for i in (1, 2, 3)]
        C, report = procrustes_mean(Ws, [1, 1, 1])
        average = sum(Ws) / 3
        assert float((C - average).norm() / average.norm()) < 5e-3
        assert max(report.angles) < 0.1


def test_rotation_lowers_the_distance_to_the_centre() -> None:
    """The report's share, recomputed from a brute-force pair rotation by scipy."""
    W = well_conditioned(0, 10, 6)
    Ws = [W, W @ exp_so(skew(1, 6, 0.5)) + 0.1 * normal(2, 10, 6)]
    C, report = procrustes_mean(Ws, [0.5, 0.5], max_sweeps=50)
    R, _ = scipy.linalg.orthogonal_procrustes(Ws[0].numpy(), Ws[1].numpy())
    half = scipy.linalg.expm(scipy.linalg.logm(R).real / 2)
    expected = (Ws[0].numpy() @ half + Ws[1].numpy() @ half.T) / 2
    np.testing.assert_allclose(C.numpy(), expected, atol=1e-10)
    left = np.linalg.norm(Ws[0].numpy() - expected @ half.T) ** 2
    apart = np.linalg.norm((Ws[0] - Ws[1]).numpy() / 2) ** 2
    assert report.rotational_share == pytest.approx([1 - left / apart] * 2, abs=1e-9)
    assert 0.5 < report.rotational_share[0] < 1


def test_energy_of_the_mean_of_rotated_models_is_theirs() -> None:
    """P10."""
    W = well_conditioned(0, 12, 8)
    C, _ = procrustes_mean([W, W @ exp_so(skew(1, 8, 1.2))], [0.3, 0.7])
    expected = hyperspherical_energy(W).value
    assert hyperspherical_energy(C).value == pytest.approx(expected, rel=1e-11)
    average = 0.3 * W + 0.7 * W @ exp_so(skew(1, 8, 1.2))
    assert abs(hyperspherical_energy(average).value - expected) > 1e-3 * expected


def test_blocks_are_rotated_apart() -> None:
    W = well_conditioned(0, 10, 8)
    L = torch.block_diag(skew(1, 4, 0.9), skew(2, 4, 0.4))
    C, report = procrustes_mean([W, W @ exp_so(L)], [0.25, 0.75], block=4)
    close(C, W @ exp_so(0.75 * L))
    assert report.angles == pytest.approx((0.675, 0.225), abs=1e-9)
    halves = [
        procrustes_mean([W[:, k : k + 4], (W @ exp_so(L))[:, k : k + 4]], [0.25, 0.75])[0]
        for k in (0, 4)
    ]
    close(C, torch.cat(halves, dim=1))


@pytest.mark.parametrize("count", [2, 3])
def test_a_reflection_is_not_taken_for_a_rotation(count: int) -> None:
    W = well_conditioned(0, 6, 4)
    mirror = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    Ws = [W, W @ mirror, W.clone()][:count]
    C, report = procrustes_mean(Ws, [1.0] * count)
    assert (report.raised, report.unrotated) == (count - 1, 0)
    assert report.frozen == 1, "refining would creep towards the reflection"
    assert max(report.angles) < 0.5
    assert float((C - sum(Ws) / count).norm() / W.norm()) < 0.15


def test_refinement_ends_at_the_best_rotation_where_a_reflection_fits_better() -> None:
    """From a large anchor; the best rotation flips the smallest singular vector (Kabsch)."""
    W = well_conditioned(0, 6, 4)
    mirror = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    _, report = procrustes_mean([W, W @ mirror], [0.5, 0.5], anchor=1.0, max_sweeps=300)
    U, _, Vh = np.linalg.svd((W.mT @ W @ mirror).numpy())
    best = U @ np.diag([1, 1, 1, np.linalg.det(U @ Vh)]) @ Vh
    angle = np.abs(np.angle(np.linalg.eigvals(best))).max()
    assert (report.raised, report.frozen, report.converged) == (0, 0, True)
    assert report.angles == pytest.approx((angle / 2, angle / 2), abs=1e-6)


def test_opposite_models_cancel() -> None:
    W = well_conditioned(0, 6, 4)
    C, report = procrustes_mean([W, -W], [0.5, 0.5])
    close(C, torch.zeros_like(C))
    assert (report.raised, report.unrotated, report.frozen) == (1, 1, 1)


def test_zero_columns_and_zero_models() -> None:
    W = well_conditioned(0, 6, 4)
    W[:, 2] = 0
    other = W @ torch.block_diag(exp_so(skew(1, 2, 0.5)), torch.eye(2, dtype=torch.float64))
    C, report = procrustes_mean([W, other], [0.5, 0.5])
    close(C[:, 2], torch.zeros(6, dtype=torch.float64), 1e-15)
    assert max(report.angles) < 0.26
    half, _ = procrustes_mean([W, torch.zeros_like(W)], [0.5, 0.5])
    close(half, W / 2)


def test_float32_and_inputs_are_kept() -> None:
    W = well_conditioned(0, 10, 8)
    Ws = [W.float(), (W @ exp_so(skew(1, 8, 1.0))).float()]
    before = [X.clone() for X in Ws]
    C, report = procrustes_mean(Ws, [1, 3])
    assert C.dtype == torch.float32
    close(C.double(), W @ exp_so(skew(1, 8, 0.75)), 5e-7)
    assert report.converged
    assert all(torch.equal(X, old) for X, old in zip(Ws, before, strict=True))


@pytest.mark.parametrize(
    "setting", [{"anchor": 0.0}, {"anchor": math.inf}, {"block": 3}, {"max_sweeps": -1}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(NumericalError, match=next(iter(setting))):
        procrustes_mean([normal(0, 4, 4), normal(1, 4, 4)], [1, 1], **setting)


def test_bad_weights_shapes_and_nan_are_refused() -> None:
    W = normal(0, 4, 4)
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]):
        with pytest.raises(NumericalError, match="weight"):
            procrustes_mean([W, normal(1, 4, 4)], weights)
    for other in (W[:2], W[None]):
        with pytest.raises(NumericalError, match="one shape"):
            procrustes_mean([W, other], [1, 1])
    with pytest.raises(NumericalError, match="not finite"):
        procrustes_mean([W, W * math.nan], [1, 1])
