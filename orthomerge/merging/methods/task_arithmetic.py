"""Base plus the weighted sum of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.linalg.factors import Factors

__all__ = ["task_arithmetic"]


def _of_factors(
    factors: Sequence[Factors], *, weights: Sequence[float], scale: float, normalize: bool
) -> Factors:
    """Return the sum of low-rank changes without loss: their factors side by side."""
    from orthomerge.linalg.factors import concatenated

    strength = scale / sum(weights) if normalize else scale
    return concatenated(factors, [strength * weight for weight in weights])


@merge_method(
    "task-arithmetic",
    space=Space.DELTA,
    reference="arXiv:2212.04089",
    laws=("identity", "permutation", "scale-equivariance", "additive"),
    divides_by_weight_sum="normalize",
    factors=_of_factors,
    batched=True,
    aliases=("sum", "cat"),
)
def task_arithmetic(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Add the weighted sum of the task vectors to the base.

    ``W = W_0 + λ Σ w_i D_i`` with ``D_i = W_i - W_0``. The sum of several task vectors is usually
    too strong: for T models a scale between 1/T and 0.6 is a sensible start.

    Args:
        base: W_0.
        deltas: D_i, one per model, of the base's shape.
        weights: w_i, one per model; a negative weight subtracts a task.
        scale: λ, multiplies the whole update.
        normalize: Divide the sum by the sum of the weights.

    Returns:
        The merged weight.

    References:
        Ilharco et al., Editing models with task arithmetic, arXiv:2212.04089, §2.

    Example:
        >>> import torch
        >>> task_arithmetic(torch.ones(2), [torch.ones(2)], weights=[1.0], scale=0.5)
        tensor([1.5000, 1.5000])
    """
    strength = scale / sum(weights) if normalize else scale
    import torch

    merged = torch.add(base, deltas[0], alpha=strength * weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=strength * weight)
    return merged
