"""Block-diagonal matrices held as their blocks: apply, enlarge, bring to one block size.

The dense n x n matrix is never formed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["align_blocks", "regroup_blocks", "rotate_columns"]


@full_precision()
def rotate_columns(W: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix from the right by a block-diagonal one.

    ``W blockdiag(R_1, ..., R_nb)``; W [..., o, n], R [nb, b, b] with ``nb b = n`` -> [..., o, n].
    One block (nb = 1) whose size divides n is repeated n/b times.

    Args:
        W: Matrices whose columns are mixed.
        R: The blocks.

    Returns:
        The product, in the wider dtype of the two, at least float32.

    Raises:
        NumericalError: The blocks do not fill n columns.

    >>> rotate_columns(torch.ones(1, 4), torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]))
    tensor([[-1.,  1., -1.,  1.]])
    """
    count, size = R.shape[-3], R.shape[-1]
    columns = W.shape[-1]
    if columns % size or count not in (1, columns // size):
        raise NumericalError(
            "the blocks do not fill the columns",
            expected=f"{columns} columns",
            found=f"{count} blocks of {size}",
            remedy="Check that the rotation belongs to this weight.",
        )
    dtype = working_dtype(W, R)
    grouped = W.to(dtype).reshape(*W.shape[:-1], columns // size, size)
    if count == 1:
        return (grouped @ R[0].to(dtype)).reshape(W.shape)
    return torch.einsum("...gi,gij->...gj", grouped, R.to(dtype)).reshape(W.shape)


def regroup_blocks(A: torch.Tensor, size: int) -> torch.Tensor:
    """Embed diagonal blocks into larger ones of the same block-diagonal matrix.

    A [..., nb, b, b] -> [..., nb b / size, size, size]; entries are copied, so this is exact and
    commutes with every power series, the Cayley map among them.

    Args:
        A: The blocks.
        size: New block size, a multiple of b that divides nb b.

    Raises:
        NumericalError: ``size`` is no such multiple.

    >>> regroup_blocks(torch.tensor([[[5.0]], [[7.0]]]), 2)
    tensor([[[5., 0.],
             [0., 7.]]])
    """
    *batch, count, old, _ = A.shape
    if size < 1 or size % old or (count * old) % size:
        raise NumericalError(
            f"{count} blocks of {old} cannot be regrouped into blocks of {size}",
            expected=f"a multiple of {old} that divides {count * old}",
            found=size,
        )
    per_block = size // old
    groups = count // per_block
    out = A.new_zeros(*batch, groups, per_block, old, per_block, old)
    # Axes (group, j, row, j, column): the diagonal over both j is where the old blocks sit.
    source = A.reshape(*batch, groups, per_block, old, old).movedim(-3, -1)
    out.diagonal(dim1=-4, dim2=-2).copy_(source)
    return out.reshape(*batch, groups, size, size)


def align_blocks(As: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """Bring block-diagonal matrices of different block sizes to one size and stack them.

    As T x [nb_t, b_t, b_t] -> [T, nb, b, b] with b the least common multiple of the b_t. One
    block that stands for n/b equal ones is repeated, unless all matrices are of that form with
    the same size; then one block remains.

    Args:
        As: The blocks of each matrix.
        columns: Size n of the dense matrices.

    Raises:
        NumericalError: The blocks of a matrix do not fill ``columns``.

    >>> align_blocks([torch.ones(4, 1, 1), torch.ones(2, 2, 2)], 4).shape
    torch.Size([2, 2, 2, 2])
    """
    for A in As:
        count, size = A.shape[-3], A.shape[-1]
        if columns % size or count not in (1, columns // size):
            raise NumericalError(
                "the blocks do not fill the columns",
                expected=f"{columns} columns",
                found=f"{count} blocks of {size}",
            )
    if len({A.shape for A in As}) == 1:
        return torch.stack(list(As))
    size = math.lcm(*(A.shape[-1] for A in As))
    expanded = [A.expand(columns // A.shape[-1], -1, -1) for A in As]
    return torch.stack([regroup_blocks(A, size) for A in expanded])
