"""DoRA as a change of a weight, split exactly: a diagonal on the output features, and two factors.

``W = diag(m / ||W0 + B A||) (W0 + B A)``, one norm per output feature, is with
``D = diag(m / ||W0 + B A||)`` the same as ``W - W0 = (D - I) W0 + (D B) A``: the low-rank part is
merged like any LoRA, the diagonals separately, and ``dora_magnitudes`` makes an adapter of both.
Formulas only: which tensors hold m, B and A is in ``lora``, how they are stored in ``lora_export``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from orthomerge.errors import AdapterError, NumericalError

if TYPE_CHECKING:
    import torch

    Rows: TypeAlias = torch.Tensor | Iterable[torch.Tensor]

__all__ = ["dora_left_factor", "dora_magnitudes", "dora_scales", "low_rank_row_norms"]

_BLOCK_ELEMENTS = 1 << 20  # of W0 at a time: 4 MiB in float32, which also stays in the cache
_NO_DORA = "Write full weights, or a LoRA adapter without magnitudes."


def low_rank_row_norms(W0: Rows, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Return the norm of every row of ``W0 + B A``, the sum never held whole.

    W0 [..., o, n], B [..., o, r], A [..., r, n] -> [..., o] in float64.

    The product is formed in the widest dtype of the three, at least float32; squares are summed in
    float64. Embeddings, and layers that store [in, out], have their features in the columns: pass
    the transposes ``W0.mT``, ``A.mT``, ``B.mT``.

    Args:
        W0: The base weight, of a convolution as [o, c kh kw]; or its rows, as successive blocks
            [..., k, n] of any heights.
        B: Left factor, scale folded in.
        A: Right factor.

    Raises:
        AdapterError: The shapes do not fit together.

    >>> import torch
    >>> W0, A = torch.tensor([[3.0, 3.0], [0.0, 1.0]]), torch.tensor([[0, 1.0]])
    >>> B = torch.ones(2, 1)
    >>> low_rank_row_norms([W0[:1], W0[1:]], B, A)
    tensor([5., 2.], dtype=torch.float64)
    """
    import torch

    from orthomerge.linalg import full_precision

    _check_factors(B, A)
    norms, row = [], 0
    with full_precision():
        for block in _blocks(W0):
            height = block.shape[-2]
            rows = B[..., row : row + height, :]
            if block.shape[-1] != A.shape[-1] or rows.shape[-2] != height:
                raise _misfit(B, A, f"rows {row} to {row + height} of W0, {list(block.shape)}")
            dtype = _wide(block, B, A)
            V = block.to(dtype) + rows.to(block.device, dtype) @ A.to(block.device, dtype)
            norms.append(torch.linalg.vector_norm(V, dim=-1, dtype=torch.float64))
            row += height
    if row != B.shape[-2]:
        raise _misfit(B, A, f"{row} rows of W0")
    return torch.cat(norms, dim=-1)


def dora_scales(W0: Rows, m: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of DoRA's ``D = diag(m / ||W0 + B A||)``.

    W0 [..., o, n], m [..., o], B [..., o, r], A [..., r, n] -> [..., o] in float64. The weight
    becomes ``D (W0 + B A)``, hence changes by ``(D - I) W0 + (D B) A``.

    Args:
        W0: The base weight or its rows in blocks, see ``low_rank_row_norms``.
        m: The magnitudes.
        B: Left factor, scale folded in.
        A: Right factor.

    Raises:
        AdapterError: The shapes do not fit together.
        NumericalError: A row of ``W0 + B A`` is zero or not finite.

    References:
        DoRA, arXiv:2402.09353, eq. 5.

    >>> import torch
    >>> W0, B, A = torch.tensor([[3.0, 3.0]]), torch.ones(1, 1), torch.tensor([[0, 1.0]])
    >>> dora_scales(W0, torch.tensor([10.0]), B, A)
    tensor([2.], dtype=torch.float64)
    """
    if m.shape[-1:] != B.shape[-2:-1]:
        raise _misfit(B, A, f"{list(m.shape)} magnitudes")
    norms = _checked(low_rank_row_norms(W0, B, A))
    return m.to(norms) / norms


def dora_left_factor(scales: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return ``D^{-1} B``, the left factor of the DoRA adapter that makes ``D W0 + B A``.

    scales [..., o], B [..., o, r] -> [..., o, r] in B's dtype, at least float32.

    Args:
        scales: The diagonal of D.
        B: Left factor of the change, scale folded in.

    Raises:
        AdapterError: The shapes do not fit together.
        NumericalError: A scale is zero or not finite.

    >>> import torch
    >>> dora_left_factor(torch.tensor([2.0]), torch.tensor([[6.0, 4.0]]))
    tensor([[3., 2.]])
    """
    import torch

    if scales.shape[-1:] != B.shape[-2:-1]:
        raise AdapterError(
            "not one scale per output feature",
            expected=f"[..., {B.shape[-2]}]",
            found=list(scales.shape),
            remedy="Pass the diagonal of D as a vector.",
        )
    bad = ~scales.isfinite() | (scales == 0)
    if bool(bad.any()):
        raise NumericalError(
            "the scale of an output feature is zero or not finite, which no DoRA adapter expresses",
            found=f"feature {_first(bad)}",
            remedy=_NO_DORA,
        )
    exact = B.to(torch.float64) / scales.to(B.device, torch.float64)[..., None]
    return exact.to(_wide(B))


def dora_magnitudes(
    scales: torch.Tensor, W0: Rows, B: torch.Tensor, A: torch.Tensor
) -> torch.Tensor:
    """Return the magnitudes with which ``(D^{-1} B, A)`` makes the weight ``D W0 + B A``.

    ``m = D ||W0 + D^{-1} B A||``, since ``D W0 + B A = D (W0 + D^{-1} B A)``; a negative scale
    gives a negative magnitude. scales [..., o], W0 [..., o, n], B [..., o, r], A [..., r, n] ->
    [..., o] in float64.

    Where the left factor is rounded before it is stored, pass ``B = D stored``: the norms that are
    divided out later are those of the stored numbers.

    Args:
        scales: The diagonal of D; ones for a change without DoRA.
        W0: The base weight or its rows in blocks, see ``low_rank_row_norms``.
        B: Left factor of the change, scale folded in; ``dora_left_factor`` gives the one to store.
        A: Right factor, stored as it is.

    Raises:
        AdapterError: The shapes do not fit together.
        NumericalError: A scale, or a row of ``D W0 + B A``, is zero or not finite.

    >>> import torch
    >>> W0, B, A = torch.tensor([[3.0, 3.0]]), 2 * torch.ones(1, 1), torch.tensor([[0, 1.0]])
    >>> dora_magnitudes(torch.tensor([2.0]), W0, B, A)
    tensor([10.], dtype=torch.float64)
    """
    norms = _checked(low_rank_row_norms(W0, dora_left_factor(scales, B), A))
    return scales.to(norms) * norms


def _blocks(W0: Rows) -> Iterator[torch.Tensor]:
    """Yield W0 in blocks of rows small enough to be copied."""
    import torch

    for block in [W0] if isinstance(W0, torch.Tensor) else W0:
        if block.ndim < 2:
            raise AdapterError(
                "the base weight must be a matrix",
                expected="[..., o, n]",
                found=list(block.shape),
                remedy="Flatten a convolution's weight to [o, c kh kw].",
            )
        per_row = max(block[..., :1, :].numel(), 1)
        yield from block.split(max(_BLOCK_ELEMENTS // per_row, 1), dim=-2)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """Return the widest dtype of the tensors, at least float32."""
    import torch

    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _checked(norms: torch.Tensor) -> torch.Tensor:
    bad = ~norms.isfinite() | (norms == 0)
    if bool(bad.any()):
        raise NumericalError(
            "DoRA divides by the norm of an output feature whose weights are all zero or not "
            "finite",
            found=f"feature {_first(bad)}",
            remedy="Give the base model that the adapter was trained on; leave pruned rows to "
            "adapters without magnitudes.",
        )
    return norms


def _first(bad: torch.Tensor) -> str:
    return ", ".join(str(index) for index in bad.nonzero()[0].tolist())


def _check_factors(B: torch.Tensor, A: torch.Tensor) -> None:
    if B.ndim < 2 or A.ndim < 2 or B.shape[-1] != A.shape[-2]:
        raise _misfit(B, A, None)


def _misfit(B: torch.Tensor, A: torch.Tensor, found: str | None) -> AdapterError:
    factors = f"B {list(B.shape)} and A {list(A.shape)}"
    return AdapterError(
        "the factors do not fit the base weight and magnitudes",
        expected="W0 [..., o, n], B [..., o, r], A [..., r, n], m [..., o]",
        found=factors if found is None else f"{factors} with {found}",
        remedy="Give the base model that the adapter was trained on.",
    )
