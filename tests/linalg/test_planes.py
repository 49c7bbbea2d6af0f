"""The merge of orthogonal planes: two independent oracles, its laws, degenerate inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import cayley, merge_planes, plane_count, rotation_angles, skewness

seeds = st.integers(0, 999)


def skews(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return A - A.mT


def planar(*angles: float) -> torch.Tensor:
    blocks = [torch.tensor([[0.0, phi], [-phi, 0.0]], dtype=torch.float64) for phi in angles]
    return torch.block_diag(*blocks)


def orthogonal(seed: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(skews(seed, size) + torch.eye(size, dtype=torch.float64))[0]


def polar_numpy(X: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return U @ Vh


def by_singular_triples(As: np.ndarray, planes: int, weights: list[float]) -> np.ndarray:
    """polar(U) diag(s) polar(V)^T of the stacked largest singular triples."""
    lefts, rights, values = [], [], []
    for A, weight in zip(As, weights, strict=True):
        U, s, Vh = np.linalg.svd(A)
        lefts.append(U[:, : 2 * planes])
        rights.append(Vh[: 2 * planes].T)
        values.append(weight * s[: 2 * planes])
    P, Q = polar_numpy(np.hstack(lefts)), polar_numpy(np.hstack(rights))
    return P @ np.diag(np.concatenate(values)) @ Q.T


@pytest.mark.parametrize(
    ("size", "count", "planes"), [(12, 3, 2), (13, 2, 3), (9, 1, 4), (6, 4, 1), (8, 3, 3)]
)
def test_is_the_product_of_polar_factors(size: int, count: int, planes: int) -> None:
    """The last two stacks are wider than the block."""
    As, weights = skews(size, count, size), [0.5 + i for i in range(count)]
    merged, _ = merge_planes(As, weights, planes=planes)
    np.testing.assert_allclose(
        merged.numpy(), by_singular_triples(As.numpy(), planes, weights), atol=1e-12
    )


@settings(max_examples=30)
@given(seeds, st.integers(2, 15))
def test_one_input_with_all_its_planes_comes_back(seed: int, size: int) -> None:
    A = skews(seed, 1, 3, size)
    merged, report = merge_planes(A)
    torch.testing.assert_close(merged, A[0], atol=1e-12, rtol=0)
    assert report.kept == (pytest.approx(1.0),)
    assert (report.planes, report.dependent) == (size // 2, 0)


@settings(max_examples=20)
@given(seeds, st.permutations(range(3)), st.lists(st.floats(0.1, 2), min_size=3, max_size=3))
def test_order_does_not_matter(seed: int, order: list[int], weights: list[float]) -> None:
    As = skews(seed, 3, 2, 12)
    one, _ = merge_planes(As, weights)
    other, _ = merge_planes(As[order], [weights[i] for i in order])
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@settings(max_examples=20)
@given(seeds)
def test_change_of_basis(seed: int) -> None:
    As, Q = skews(seed, 3, 12), orthogonal(seed + 1, 12)
    moved, _ = merge_planes(Q @ As @ Q.T)
    torch.testing.assert_close(moved, Q @ merge_planes(As)[0] @ Q.T, atol=1e-12, rtol=0)


@settings(max_examples=20)
@given(seeds, st.floats(-3, 3))
def test_disjoint_planes_are_summed_exactly(seed: int, strength: float) -> None:
    Q = orthogonal(seed, 9)
    parts = [
        planar(0.5, 0.2, 0, 0),
        planar(0, 0, 0.7, 0),
        planar(0, 0, 0, 0.1),
    ]
    zero = torch.zeros(1, 1, dtype=torch.float64)
    As = torch.stack([Q @ torch.block_diag(part, zero) @ Q.T for part in parts])
    merged, report = merge_planes(As, [1.0, 2.0, 1.0], planes=2, strength=strength)
    expected = strength * (As[0] + 2 * As[1] + As[2])
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=0)
    assert (report.empty, report.dependent) == (2, 0)
    assert report.kept == pytest.approx((1.0, 1.0, 1.0))


def test_planes_of_the_result_are_orthogonal_and_carry_the_angles() -> None:
    As = skews(0, 3, 16)
    merged, report = merge_planes(As)
    thetas = torch.linalg.svdvals(As)[:, : 2 * report.planes : 2].flatten().sort(descending=True)
    found = torch.linalg.svdvals(merged)[: 2 * len(thetas.values)]
    torch.testing.assert_close(found, thetas.values.repeat_interleave(2), atol=1e-12, rtol=0)
    expected = 2 * torch.cat([thetas.values, torch.zeros(2, dtype=torch.float64)]).atan()
    torch.testing.assert_close(rotation_angles(cayley(merged)), expected, atol=1e-12, rtol=0)


def test_tied_angles_are_paired_within_their_planes() -> None:
    """All singular values equal: singular vectors alone would not say which belong together."""
    Q = orthogonal(3, 8)
    A = (Q @ planar(0.5, 0.5, 0.5, 0.5) @ Q.T)[None]
    torch.testing.assert_close(merge_planes(A)[0], A[0], atol=1e-12, rtol=0)
    half, _ = merge_planes(A, planes=2)
    expected = torch.tensor([0.5] * 4 + [0.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(half), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(half @ half @ half, -0.25 * half, atol=1e-12, rtol=0)


def test_angles_of_very_different_size() -> None:
    Q = orthogonal(4, 7)
    L = torch.block_diag(planar(1.0, 1e-7, 1e-13), torch.zeros(1, 1, dtype=torch.float64))
    A = (Q @ L @ Q.T)[None]
    A = (A - A.mT) / 2
    torch.testing.assert_close(merge_planes(A)[0], A[0], atol=1e-14, rtol=0)


def test_a_plane_shared_by_two_gets_the_mean_of_their_angles() -> None:
    Q = orthogonal(5, 8)
    As = torch.stack([Q @ planar(phi, 0, 0, 0) @ Q.T for phi in (0.2, 0.6)])
    merged, report = merge_planes(As, planes=1)
    torch.testing.assert_close(merged, As.mean(dim=0), atol=1e-12, rtol=0)
    assert report.dependent == 2


def test_zero_inputs_and_zero_weights_take_no_part() -> None:
    As = skews(0, 2, 2, 8)
    padded = torch.cat([As, torch.zeros(1, 2, 8, 8, dtype=torch.float64)])
    alone, _ = merge_planes(As, planes=1)
    torch.testing.assert_close(merge_planes(padded, planes=1)[0], alone, atol=1e-13, rtol=0)
    with_third = torch.cat([As, skews(9, 1, 2, 8)])
    weighted, report = merge_planes(with_third, [1, 1, 0], planes=1)
    torch.testing.assert_close(weighted, alone, atol=1e-13, rtol=0)
    assert report.empty == 2
    nothing, report = merge_planes(torch.zeros(3, 8, 8))
    assert torch.equal(nothing, torch.zeros(8, 8))
    assert report.kept == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_result_is_skew_in_its_dtype_and_inputs_are_kept(dtype: torch.dtype) -> None:
    As = skews(1, 3, 2, 9).to(dtype)
    before = As.clone()
    merged, report = merge_planes(As)
    assert merged.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert skewness(merged) == (True, 0.0)
    assert torch.equal(As, before)
    assert report.merged_norm == pytest.approx(float(torch.linalg.vector_norm(merged)), rel=1e-6)


def test_kept_share_counts_the_largest_planes() -> None:
    report = merge_planes(planar(3.0, 4.0, 0.0)[None], planes=1)[1]
    assert report.kept == (pytest.approx(16 / 25),)


def test_plane_count() -> None:
    assert [plane_count(32, T) for T in (1, 2, 3, 5, 40)] == [16, 8, 5, 3, 1]
    with pytest.raises(NumericalError):
        plane_count(32, 0)
    assert merge_planes(torch.zeros(2, 3, 1, 1))[0].shape == (3, 1, 1)


@pytest.mark.parametrize("planes", [0, 5])
def test_impossible_plane_counts_are_refused(planes: int) -> None:
    with pytest.raises(NumericalError, match="planes"):
        merge_planes(skews(0, 2, 8), planes=planes)


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan]])
def test_bad_weights_and_inputs_are_refused(weights: list[float]) -> None:
    with pytest.raises(NumericalError, match="weight"):
        merge_planes(skews(0, 2, 8), weights)
    with pytest.raises(NumericalError, match="finite"):
        merge_planes(skews(0, 2, 8), strength=math.inf)
    with pytest.raises(NumericalError, match="not finite"):
        merge_planes(torch.full((2, 4, 4), math.nan))
