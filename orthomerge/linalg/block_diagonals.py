"""Diagonal blocks of square matrices as one padded batch, and products with block-diagonal ones.

Small blocks are decomposed many times faster in one batch than one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["block_diagonal", "block_mask", "block_owners", "blocks_times", "diagonal_blocks"]


def diagonal_blocks(G: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the diagonal blocks [..., N, m, m] of G [..., R, R], padded with zeros to the largest.

    >>> diagonal_blocks(torch.arange(9.0).reshape(3, 3), [1, 2])[0]
    tensor([[0., 0.],
            [0., 0.]])
    """
    count, largest = len(sizes), max(sizes, default=0)
    if min(sizes, default=0) == largest:
        grid = G.reshape(*G.shape[:-2], count, largest, count, largest)
        return grid.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    blocks = G.new_zeros(*G.shape[:-2], count, largest, largest)
    start = 0
    for at, size in enumerate(sizes):
        own = slice(start, start + size)
        blocks[..., at, :size, :size] = G[..., own, own]
        start += size
    return blocks


def block_diagonal(blocks: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the matrix [..., R, R] with these diagonal blocks, and zeros elsewhere."""
    total = sum(sizes)
    whole = blocks.new_zeros(*blocks.shape[:-3], total, total)
    start = 0
    for at, size in enumerate(sizes):
        own = slice(start, start + size)
        whole[..., own, own] = blocks[..., at, :size, :size]
        start += size
    return whole


def blocks_times(blocks: Tensor, X: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return ``blkdiag(blocks) X``, X [..., R, d]."""
    if min(sizes, default=0) != max(sizes, default=0):
        product: Tensor = block_diagonal(blocks, sizes) @ X
        return product
    rows = X.reshape(*X.shape[:-2], len(sizes), blocks.shape[-1], X.shape[-1])
    return (blocks @ rows).reshape(X.shape)


def block_mask(X: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return ones [R, R] off the diagonal blocks and zeros on them, in X's dtype and place."""
    owner = block_owners(sizes, X.device)
    return (owner[:, None] != owner).to(X.dtype)


def block_owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Return the number of the block that each row belongs to [R].

    >>> block_owners([1, 2], torch.device("cpu"))
    tensor([0, 1, 1])
    """
    rows = [at for at, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(rows, dtype=torch.int64, device=device)
