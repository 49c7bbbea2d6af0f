"""Apply a method of matrices to a tensor of any shape.

Convolution kernels are seen as [out, in · kh · kw], a stack of experts' matrices one by one; what
is no matrix gets the mean. What happens to a matrix is each method's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["merge_matrices"]


def merge_matrices(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    update: Callable[[Sequence[Tensor], Sequence[float]], Tensor],
    *,
    role: str,
    scale: float,
) -> Tensor:
    """Return ``W_0 + λ update(deltas, weights)``, matrix by matrix.

    Tensors that are no matrices (biases, norms) become ``W_0 + λ Σ w_i D_i / T``, T the number of
    models whose weight is not zero; the others take no part.

    Args:
        base: W_0.
        deltas: D_i, one per model, of the base's shape.
        weights: w_i, one per model.
        update: Gives the update of one matrix, in any dtype, from matrices of several models.
        role: What the tensor is in the model.
        scale: λ.

    Example:
        >>> import torch
        >>> deltas = [torch.ones(1, 2), torch.ones(1, 2)]
        >>> merge_matrices(
        ...     torch.zeros(1, 2), deltas, [1.0, 0.0], lambda d, w: d[0], role="linear", scale=2.0
        ... )
        tensor([[2., 2.]])
    """
    import torch

    taking_part = [(w, d) for w, d in zip(weights, deltas, strict=True) if w != 0.0]
    if not taking_part:
        return base.clone()
    weights, deltas = [w for w, _ in taking_part], [d for _, d in taking_part]
    if role == "other" or base.ndim < 2:
        total = sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(base))
        return base + total * (scale / len(deltas))
    if role == "stack":
        slices = [update([d[i] for d in deltas], weights) for i in range(base.shape[0])]
        merged = torch.stack(slices)
    else:
        merged = update([d.reshape(base.shape[0], -1) for d in deltas], weights)
    return base + scale * merged.reshape(base.shape).to(base.dtype)
