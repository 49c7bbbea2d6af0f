"""Skew-symmetric matrices and their packed form, the strict upper triangle row by row.

The order is the one PEFT stores OFT parameters in. What the matrices mean is not decided here.
"""

from __future__ import annotations

import torch

from orthomerge.linalg.triangular import block_size

__all__ = ["pack_skew", "unpack_skew"]


def pack_skew(Q: torch.Tensor) -> torch.Tensor:
    """Return the strict upper triangle of skew blocks, row-major.

    ``p[idx(i, j)] = Q[i, j]`` for ``i < j``; Q [..., b, b] -> [..., b(b-1)/2].

    Args:
        Q: Skew-symmetric blocks. The lower triangle is not read; use ``skewness`` when it is in
            doubt.

    Returns:
        The packed blocks, in the dtype of ``Q``.

    >>> pack_skew(torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
    tensor([2.])
    """
    rows, columns = _upper(Q.shape[-1], Q.device)
    return Q[..., rows, columns]


def unpack_skew(packed: torch.Tensor) -> torch.Tensor:
    """Return the skew blocks whose strict upper triangles are ``packed``.

    ``Q = U - U^T`` with U strictly upper triangular; packed [..., b(b-1)/2] -> [..., b, b].

    Args:
        packed: Row-major strict upper triangles; the block size follows from the last axis.

    Returns:
        The blocks, in the dtype of ``packed``, exactly skew-symmetric.

    Raises:
        NumericalError: The last axis has the length of no triangle.

    >>> unpack_skew(torch.tensor([2.0]))
    tensor([[ 0.,  2.],
            [-2.,  0.]])
    """
    size = block_size(packed.shape[-1])
    rows, columns = _upper(size, packed.device)
    Q = packed.new_zeros(*packed.shape[:-1], size, size)
    Q[..., rows, columns] = packed
    Q[..., columns, rows] = -packed
    return Q


def _upper(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.triu_indices(size, size, 1, device=device)
    return rows, columns
