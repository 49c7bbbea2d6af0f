"""Sum the task vectors and give every direction of the sum the same strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.matrices import merge_matrices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["iso_c"]


def _workspace(shape: tuple[int, ...], models: int) -> int:
    """Return the float32 elements held: fp64 sum, Gram matrix, vectors and both frames."""
    del models
    rows, columns = shape[0], math.prod(shape[1:])
    short = min(rows, columns)
    return 2 * (4 * short**2 + 3 * rows * columns + 2 * (rows + columns) * short)


@merge_method(
    "iso-c",
    space=Space.DELTA,
    reference="arXiv:2502.04959",
    laws=("permutation", "scale-equivariance", "additive"),
    whole=True,
    workspace=_workspace,
)
def iso_c(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    role: str = "linear",
    scale: float = 1.0,
) -> Tensor:
    """Add up the task vectors and replace every singular value of the sum by their mean.

    For matrices: ``Σ w_i D_i = U S V^T`` with the q singular values above 1e-6 of the largest,
    and ``W = W_0 + λ mean(S) U V^T``. The mean is over those q: a sum of low rank keeps its rank,
    and no energy goes into directions that no task uses. Other tensors: ``W_0 + λ Σ w_i D_i / T``.
    Convolution kernels are seen as [out, in · kh · kw], a stack of experts' matrices one by one.

    Args:
        base: W_0.
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i, one per model; a model of weight 0 takes no part.
        role: What the tensor is in the model.
        scale: λ, multiplies the whole update.

    Returns:
        The merged weight.

    References:
        Marczak et al., No Task Left Behind, arXiv:2502.04959: Iso-C.

    Example:
        >>> import torch
        >>> deltas = [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]
        >>> iso_c(torch.zeros(2, 2), deltas, weights=[1.0, 1.0])
        tensor([[2., 0.],
                [0., 2.]])
    """
    return merge_matrices(base, deltas, weights, _update, role=role, scale=scale)


def _update(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``mean(S) U V^T`` in float64; the deltas are matrices."""
    from orthomerge.merging.steps.isotropic import common_directions, flat_spectrum

    return flat_spectrum([common_directions(deltas, weights)], deltas[0])
