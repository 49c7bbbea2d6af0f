"""Block-diagonal products and regrouping, against the dense matrices they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import (
    align_blocks,
    cayley,
    cayley_neumann,
    regroup_blocks,
    rotate_columns,
    unpack_skew,
)


def random_blocks(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(count, size * (size - 1) // 2, generator=generator, dtype=torch.float64)
    return unpack_skew(0.3 * packed)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_rotate_columns_is_the_dense_product(count: int, size: int, rows: list[int]) -> None:
    R = cayley(random_blocks(count, size))
    W = torch.randn(*rows, count * size, dtype=torch.float64)
    before = W.clone()
    expected = W @ torch.block_diag(*R)
    torch.testing.assert_close(rotate_columns(W, R), expected, atol=1e-13, rtol=0)
    assert torch.equal(W, before)


def test_one_block_is_repeated() -> None:
    R = cayley(random_blocks(1, 3))
    W = torch.randn(5, 12, dtype=torch.float64)
    expected = W @ torch.block_diag(*R.expand(4, -1, -1))
    torch.testing.assert_close(rotate_columns(W, R), expected, atol=1e-13, rtol=0)


def test_half_precision_weights_come_back_in_float32() -> None:
    R = cayley(random_blocks(2, 2)).float()
    W = torch.randn(3, 4).bfloat16()
    out = rotate_columns(W, R)
    assert out.dtype == torch.float32
    assert torch.equal(out, rotate_columns(W.float(), R))


@pytest.mark.parametrize(("columns", "count", "size"), [(8, 3, 2), (7, 1, 2), (6, 2, 2), (4, 2, 4)])
def test_blocks_that_do_not_fill_are_refused(columns: int, count: int, size: int) -> None:
    with pytest.raises(NumericalError, match="do not fill"):
        rotate_columns(torch.ones(2, columns), torch.zeros(count, size, size))
    with pytest.raises(NumericalError, match="do not fill"):
        align_blocks([torch.zeros(count, size, size)], columns)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_regrouping_is_exact(size: int, factor: int, groups: int) -> None:
    A = random_blocks(factor * groups, size)
    larger = regroup_blocks(A, factor * size)
    assert larger.shape == (groups, factor * size, factor * size)
    assert torch.equal(torch.block_diag(*larger), torch.block_diag(*A))


@pytest.mark.parametrize("function", [cayley, lambda A: cayley_neumann(A, 5)])
def test_regrouping_gives_the_same_rotation(function) -> None:  # type: ignore[no-untyped-def]
    A = random_blocks(6, 2)
    small, large = function(A), function(regroup_blocks(A, 6))
    torch.testing.assert_close(
        torch.block_diag(*large), torch.block_diag(*small), atol=1e-14, rtol=0
    )


def test_regrouping_keeps_batch_axes() -> None:
    A = torch.stack([random_blocks(4, 2, seed) for seed in range(3)])
    larger = regroup_blocks(A, 4)
    assert larger.shape == (3, 2, 4, 4)
    assert torch.equal(larger[1], regroup_blocks(A[1], 4))


@pytest.mark.parametrize("size", [0, 3, 5, 16])
def test_sizes_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(NumericalError, match="regrouped"):
        regroup_blocks(torch.zeros(6, 2, 2), size)


def test_align_takes_the_least_common_multiple() -> None:
    As = [random_blocks(6, 2), random_blocks(4, 3), random_blocks(1, 4)]
    aligned = align_blocks(As, 12)
    assert aligned.shape == (3, 1, 12, 12)
    dense = [*As[:2], As[2].expand(3, -1, -1)]
    for one, blocks in zip(aligned, dense, strict=True):
        assert torch.equal(one[0], torch.block_diag(*blocks))


def test_align_keeps_shared_blocks_only_when_all_are() -> None:
    shared = [random_blocks(1, 2, seed) for seed in range(2)]
    assert align_blocks(shared, 8).shape == (2, 1, 2, 2)
    assert align_blocks([*shared, random_blocks(4, 2)], 8).shape == (3, 4, 2, 2)
