"""Packing of skew-symmetric blocks: round trips, order, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import block_size, pack_skew, packed_width, unpack_skew


@pytest.mark.parametrize("size", range(1, 40))
def test_block_size_inverts_packed_width(size: int) -> None:
    assert block_size(packed_width(size)) == size


@pytest.mark.parametrize("width", [-1, 2, 4, 5, 7, 495, 497])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(NumericalError, match="packed width"):
        block_size(width)


def test_huge_widths_are_exact() -> None:
    size = 10**17 + 3
    assert block_size(packed_width(size)) == size
    with pytest.raises(NumericalError):
        block_size(packed_width(size) + 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 99))
def test_pack_inverts_unpack(size: int, batch: list[int], seed: int) -> None:
    """P18, bit for bit, with any batch axes."""
    torch.manual_seed(seed)
    packed = torch.randn(*batch, packed_width(size))
    blocks = unpack_skew(packed)
    assert blocks.shape == (*batch, size, size)
    assert torch.equal(blocks, -blocks.mT)
    assert torch.equal(pack_skew(blocks), packed)


def test_order_is_the_row_major_upper_triangle() -> None:
    expected = np.zeros((4, 4))
    expected[np.triu_indices(4, 1)] = np.arange(1.0, 7.0)
    blocks = unpack_skew(torch.arange(1.0, 7.0, dtype=torch.float64))
    assert np.array_equal(blocks.numpy(), expected - expected.T)


def test_input_is_not_mutated_and_dtype_is_kept() -> None:
    packed = torch.randn(2, 6, dtype=torch.bfloat16)
    before = packed.clone()
    assert unpack_skew(packed).dtype == torch.bfloat16
    assert torch.equal(packed, before)
