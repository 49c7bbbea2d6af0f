"""What an OFT adapter does to a weight: from skew blocks to rotation blocks to the new weight.

Everything works on the canonical skew matrices of ``oft``, so no sign appears here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from orthomerge.adapters.convention import OftConvention
from orthomerge.errors import AdapterError, UnknownNameError

if TYPE_CHECKING:
    import torch

__all__ = [
    "BackMap",
    "apply_left_rotation",
    "apply_rotation",
    "left_blocks_fit",
    "rotate_rows",
    "rotation",
]

BackMap = Literal["as_trained", "exact"]


def rotation(
    A: torch.Tensor, convention: OftConvention, back_map: BackMap = "as_trained"
) -> torch.Tensor:
    """Map canonical skew blocks to the blocks R of ``W_eff = W0 blockdiag(R)``.

    ``R = Cayley(A)``, or the truncated series in A when the adapter was trained with it. Linear
    layers and embeddings need no distinction: K(Q)^T = K(-Q), and A carries the sign.
    A, R [nb, b, b].

    Args:
        A: Canonical skew blocks, see ``OftAdapter.skew``.
        convention: The adapter's convention.
        back_map: "as_trained" reproduces PEFT's effective weight; "exact" is always the Cayley
            map, an exact rotation.

    Returns:
        The blocks, in float32 or float64.

    Raises:
        UnknownNameError: ``back_map`` is neither.

    >>> import torch
    >>> from orthomerge.adapters.convention import EXACT
    >>> rotation(torch.zeros(1, 2, 2), EXACT)
    tensor([[[1., 0.],
             [0., 1.]]])
    """
    from orthomerge.linalg import cayley, cayley_neumann

    if back_map not in get_args(BackMap):
        raise UnknownNameError("back_map", back_map, get_args(BackMap))
    if back_map == "exact" or not convention.cayley_neumann:
        return cayley(A)
    return cayley_neumann(A, convention.terms, legacy=convention.legacy)


def apply_rotation(
    W0: torch.Tensor, R: torch.Tensor, *, shared: bool = False, name: str | None = None
) -> torch.Tensor:
    """Rotate a weight from the right, ``W0 blockdiag(R)``.

    W0 [o, n] of a linear layer or embedding; a convolution's [o, c, kh, kw] is seen as
    [o, c kh kw], as PEFT does.

    Args:
        W0: The base weight.
        R: Blocks [nb, b, b] with ``nb b = n``.
        shared: R is one block that stands for n/b equal ones.
        name: The weight's name, for the message.

    Returns:
        The rotated weight in W0's shape, in the wider dtype of the two, at least float32.

    Raises:
        AdapterError: The blocks do not fill the weight's columns.

    >>> import torch
    >>> apply_rotation(torch.ones(1, 2), torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]))
    tensor([[-1.,  1.]])
    """
    from orthomerge.linalg import rotate_columns

    count, size = R.shape[-3], R.shape[-1]
    columns = W0.shape[1:].numel() if W0.ndim >= 2 else 0
    fits = columns % size == 0 if shared and count == 1 else columns == count * size
    if not fits or columns == 0:
        raise AdapterError(
            "the adapter's rotation does not fit this weight",
            tensor=name,
            expected=f"a multiple of {size} columns" if shared else f"{count * size} columns",
            found=f"shape {list(W0.shape)}",
            remedy="Give the base model that the adapter was trained on.",
        )
    return rotate_columns(W0.reshape(W0.shape[0], columns), R).reshape(W0.shape)


def left_blocks_fit(rows: int, count: int, size: int, *, shared: bool = False) -> bool:
    """Return whether blocks fill the rows of a weight that PEFT before 0.14 rotates from the left.

    >>> left_blocks_fit(10, 4, 3), left_blocks_fit(10, 4, 2)
    (True, False)
    """
    return rows > 0 and (shared or size == -(-rows // count))


def apply_left_rotation(
    W0: torch.Tensor, R: torch.Tensor, *, shared: bool = False, name: str | None = None
) -> torch.Tensor:
    """Rotate a weight from the left, ``L W0`` with L the first o rows and columns of blockdiag(R).

    W0 [o, ...]; PEFT before 0.14 lets the last block reach beyond o, and cuts it.

    Args:
        W0: The base weight.
        R: Blocks [nb, b, b] with ``b = ceil(o / nb)``.
        shared: R is one block that stands for ``ceil(o / b)`` equal ones.
        name: The weight's name, for the message.

    Returns:
        The rotated weight in W0's shape, in the wider dtype of the two, at least float32.

    Raises:
        AdapterError: The blocks do not fill the weight's rows.

    >>> import torch
    >>> apply_left_rotation(torch.ones(2, 1), torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]))
    tensor([[ 1.],
            [-1.]])
    """
    count, size = R.shape[-3], R.shape[-1]
    rows = W0.shape[0] if W0.ndim >= 2 else 0
    if not left_blocks_fit(rows, count, size, shared=shared):
        raise AdapterError(
            "the adapter's rotation does not fit this weight",
            tensor=name,
            expected=f"{count} blocks of ceil(rows / {count}) features",
            found=f"blocks of {size}, shape {list(W0.shape)}",
            remedy="Give the base model that the adapter was trained on.",
        )
    return rotate_rows(W0, R.expand(-(-rows // size), -1, -1) if shared else R)


def rotate_rows(W0: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """Return the first o rows of ``blockdiag(R) W0``, W0 filled up with rows of zeros.

    W0 [o, ...]; R [nb, b, b] with ``nb b >= o``.

    >>> import torch
    >>> rotate_rows(torch.ones(1, 2), torch.tensor([[[0.5, 1.0], [-1.0, 0.5]]]))
    tensor([[0.5000, 0.5000]])
    """
    from torch.nn.functional import pad

    from orthomerge.linalg import rotate_columns

    rows = W0.shape[0]
    columns = pad(W0.reshape(rows, -1).mT, (0, R.shape[-3] * R.shape[-1] - rows))
    return rotate_columns(columns, R.mT)[:, :rows].mT.reshape(W0.shape)
