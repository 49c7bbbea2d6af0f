"""The magnitude-corrected mean: oracle O1, its laws, its guards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError, UnknownNameError
from orthomerge.linalg import Correction, merge_algebra, pack_skew, unpack_skew


def adapters(seed: int, count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return ``count`` random layers of two 4 x 4 skew blocks."""
    generator = torch.Generator().manual_seed(seed)
    return unpack_skew(0.1 * torch.randn(count, 2, 6, generator=generator, dtype=dtype))


def norm(A: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(A))


O1_NORMS = [0.5819770441138797, 0.4949186314958869, 0.5802886550813604]
O1_MERGED = [
    [0.21958208, -0.04270579, 0.0672442, 0.10933132, 0.22414201, 0.01313975],
    [0.06494269, -0.02872705, -0.16229883, -0.04197517, 0.03025099, 0.0397714],
]


def test_oracle_o1() -> None:
    rs = np.random.RandomState(0)
    packed = np.stack([0.1 * rs.standard_normal((2, 6)) for _ in range(3)])
    merged, info = merge_algebra(unpack_skew(torch.from_numpy(packed)), [1, 1, 1])
    assert info.norms == pytest.approx(O1_NORMS, abs=1e-15)
    assert 3 * info.sum_norm == pytest.approx(1.2062219011673527, abs=1e-15)
    assert info.factors == (pytest.approx(1.3738635727699386, abs=1e-14),)
    assert info.merged_norm == pytest.approx(0.5523947768970422, abs=1e-15)
    np.testing.assert_allclose(pack_skew(merged).numpy(), O1_MERGED, atol=5e-9, rtol=0)


def test_oracle_o1_weighted() -> None:
    packed = [0.1 * np.random.RandomState(seed).standard_normal((2, 6)) for seed in (0, 1)]
    merged, info = merge_algebra(unpack_skew(torch.from_numpy(np.stack(packed))), [0.7, 0.3])
    assert info.merged_norm == pytest.approx(0.6002197514734011, abs=1e-15)
    expected = [0.21866989, 0.01226371, 0.06687364]
    assert pack_skew(merged)[0, :3].tolist() == pytest.approx(expected, abs=5e-9)


def test_factors_of_a_layer_and_of_its_blocks() -> None:
    packed = [0.1 * np.random.RandomState(seed).standard_normal((2, 6)) for seed in (0, 1)]
    As = unpack_skew(torch.from_numpy(np.stack(packed)))
    _, by_layer = merge_algebra(As, [1, 1])
    assert by_layer.factors == pytest.approx([1.32958], abs=5e-6)
    _, by_block = merge_algebra(As, [1, 1], correction="block")
    assert by_block.factors == pytest.approx([1.24009, 1.49650], abs=5e-6)


counts = st.integers(1, 5)
seeds = st.integers(0, 999)
weight_lists = st.lists(st.floats(0.05, 10), min_size=5, max_size=5)
corrections = st.sampled_from(["layer", "block", "none"])


@settings(max_examples=30, deadline=None)
@given(seeds, counts, weight_lists)
def test_norm_is_the_mean_norm(seed: int, count: int, weights: list[float]) -> None:
    """P14, for the layer and for every block."""
    As, shares = adapters(seed, count), np.array(weights[:count]) / sum(weights[:count])
    merged, info = merge_algebra(As, weights[:count])
    expected = sum(share * norm(A) for share, A in zip(shares, As, strict=True))
    assert norm(merged) == pytest.approx(expected, rel=1e-12)
    assert info.merged_norm == pytest.approx(expected, rel=1e-12)
    by_block, _ = merge_algebra(As, weights[:count], correction="block")
    for k in range(2):
        expected = sum(share * norm(A[k]) for share, A in zip(shares, As, strict=True))
        assert norm(by_block[k]) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds, corrections, st.floats(0.01, 100))
def test_one_adapter_is_itself(seed: int, correction: Correction, weight: float) -> None:
    """P1 in the algebra, bit for bit: nothing is rounded on the way."""
    As = adapters(seed, 1)
    merged, info = merge_algebra(As, [weight], correction=correction)
    torch.testing.assert_close(merged, As[0], atol=0, rtol=1e-15)
    assert info.factors == pytest.approx([1.0] * len(info.factors), abs=1e-15)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 5), corrections, weight_lists)
def test_equal_adapters_are_themselves(
    seed: int, count: int, correction: Correction, weights: list[float]
) -> None:
    """P2 in the algebra."""
    A = adapters(seed, 1)
    merged, _ = merge_algebra(A.expand(count, -1, -1, -1), weights[:count], correction=correction)
    torch.testing.assert_close(merged, A[0], atol=1e-15, rtol=1e-14)


@settings(max_examples=30, deadline=None)
@given(seeds, corrections, weight_lists, st.permutations(range(5)))
def test_order_does_not_matter(
    seed: int, correction: Correction, weights: list[float], order: list[int]
) -> None:
    """P3 in the algebra."""
    As = adapters(seed, 5)
    one, _ = merge_algebra(As, weights, correction=correction)
    other, _ = merge_algebra(As[order], [weights[i] for i in order], correction=correction)
    torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seeds, corrections, st.floats(-4, 4).filter(lambda x: abs(x) > 1e-2))
def test_merge_is_odd_and_homogeneous(seed: int, correction: Correction, factor: float) -> None:
    As = adapters(seed, 3)
    scaled, _ = merge_algebra(factor * As, [1, 2, 3], correction=correction)
    plain, _ = merge_algebra(As, [1, 2, 3], correction=correction)
    torch.testing.assert_close(scaled, factor * plain, atol=1e-13, rtol=0)


def test_strength_scales_the_result() -> None:
    As = adapters(0, 3)
    half, info = merge_algebra(As, [1, 1, 1], strength=0.5)
    torch.testing.assert_close(half, 0.5 * merge_algebra(As, [1, 1, 1])[0])
    assert info.merged_norm == pytest.approx(norm(half))


def test_no_correction_is_the_plain_mean() -> None:
    As = adapters(0, 3)
    merged, info = merge_algebra(As, [1, 1, 2], correction="none")
    torch.testing.assert_close(merged, (As[0] + As[1] + 2 * As[2]) / 4)
    assert info.factors == (1.0,)


def test_independent_adapters_have_factor_root_count() -> None:
    generator = torch.Generator().manual_seed(0)
    As = unpack_skew(torch.randn(5, 4, 496, generator=generator))
    assert merge_algebra(As, [1] * 5)[1].factors[0] == pytest.approx(math.sqrt(5), rel=0.03)


@pytest.mark.parametrize("correction", ["layer", "block", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_zero_gives_zero(correction: Correction, dtype: torch.dtype) -> None:
    merged, info = merge_algebra(
        torch.zeros(3, 2, 4, 4, dtype=dtype), [1, 1, 1], correction=correction
    )
    assert torch.equal(merged, torch.zeros(2, 4, 4, dtype=dtype))
    assert info.merged_norm == 0


@pytest.mark.parametrize("correction", ["layer", "block", "none"])
def test_exact_opposites_give_zero(correction: Correction) -> None:
    """P6 in the algebra; the reference implementation gives NaN."""
    A = adapters(0, 1)[0]
    merged, info = merge_algebra(torch.stack([A, -A]), [1, 1], correction=correction)
    assert torch.equal(merged, torch.zeros_like(A))
    assert info.zeroed == {"layer": 1, "block": 2, "none": 0}[correction]


def test_zero_blocks_do_not_disturb_their_neighbours() -> None:
    As = adapters(0, 2)
    As[:, 0] = 0
    merged, info = merge_algebra(As, [1, 1], correction="block")
    assert torch.equal(merged[0], torch.zeros(4, 4, dtype=torch.float64))
    assert norm(merged[1]) == pytest.approx((norm(As[0, 1]) + norm(As[1, 1])) / 2)
    assert (info.factors[0], info.zeroed) == (0.0, 1)


def test_nearly_opposite_adapters_are_noise_unless_the_guard_is_lowered() -> None:
    A = adapters(0, 1)[0]
    pair = torch.stack([A, -(1 - 1e-6) * A])
    assert norm(merge_algebra(pair, [1, 1])[0]) == 0
    merged, info = merge_algebra(pair, [1, 1], zero_guard=1e-9)
    assert norm(merged) == pytest.approx(norm(A), rel=1e-5)
    assert info.factors[0] == pytest.approx(2.0e6, rel=1e-3)


@pytest.mark.parametrize("correction", ["layer", "block"])
def test_c_max_bounds_the_factor(correction: Correction) -> None:
    """P7."""
    A = adapters(0, 1)[0]
    pair = torch.stack([A, -0.9 * A])
    merged, info = merge_algebra(pair, [1, 1], correction=correction, c_max=3.0)
    assert norm(merged) == pytest.approx(3.0 * info.sum_norm, rel=1e-12)
    assert (set(info.factors), info.capped) == ({3.0}, len(info.factors))


def test_one_matrix_without_block_axis() -> None:
    As = adapters(0, 3)[:, 0]
    merged, info = merge_algebra(As, [1, 1, 1], correction="block")
    assert merged.shape == (4, 4)
    torch.testing.assert_close(merged, merge_algebra(As, [1, 1, 1])[0])
    assert len(info.factors) == 1


def test_norms_stay_accurate_in_large_float32_layers() -> None:
    """float32 sums over 16 million squares at once are wrong by 6e-4."""
    A = torch.randn(1, 4096, 4096, generator=torch.Generator().manual_seed(0))
    exact = math.sqrt(sum(float(row.double() @ row.double()) for row in A[0]))
    assert merge_algebra(A, [1.0])[1].norms[0] == pytest.approx(exact, rel=1e-7)


def test_half_precision_is_lifted_and_inputs_are_kept() -> None:
    As = adapters(0, 3).bfloat16()
    before = As.clone()
    merged, _ = merge_algebra(As, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(merged, merge_algebra(As.float(), [1, 2, 3])[0])
    assert torch.equal(As, before)


@pytest.mark.parametrize(
    "weights", [[1, -1, 1], [0, 0, 0], [1, math.nan, 1], [1, math.inf, 1], [1, 1]]
)
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(NumericalError, match="weight"):
        merge_algebra(adapters(0, 3), weights)


@pytest.mark.parametrize(
    "setting", [{"strength": math.nan}, {"c_max": 0.5}, {"zero_guard": -1.0}, {"zero_guard": 1.0}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(NumericalError, match=next(iter(setting))):
        merge_algebra(adapters(0, 2), [1, 1], **setting)


def test_unknown_correction_and_nan_are_refused() -> None:
    As = adapters(0, 2)
    with pytest.raises(UnknownNameError, match="'layer'"):
        merge_algebra(As, [1, 1], correction="layers")  # type: ignore[arg-type]
    As[0, 0, 0, 1] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        merge_algebra(As, [1, 1])
