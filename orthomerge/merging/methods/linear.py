"""Weighted average of the models' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.linalg.factors import Factors

__all__ = ["linear"]


def _of_factors(
    factors: Sequence[Factors], *, weights: Sequence[float], normalize: bool
) -> Factors:
    """Return the mean of low-rank changes without loss: their factors side by side."""
    from orthomerge.linalg.factors import concatenated

    total = sum(weights) if normalize else 1.0
    return concatenated(factors, [weight / total for weight in weights])


@merge_method(
    "linear",
    space=Space.WEIGHT,
    reference="Model soups, arXiv:2203.05482",
    laws=("identity", "idempotent", "permutation", "scale-equivariance"),
    divides_by_weight_sum="normalize",
    factors=_of_factors,
    batched=True,
    aliases=("mean", "average"),
)
def linear(
    tensors: Sequence[Tensor], *, weights: Sequence[float], normalize: bool = True
) -> Tensor:
    """Average the models' weights.

    ``W = Σ w_i W_i / Σ w_i``, or ``Σ w_i W_i`` without ``normalize``. LoRA adapters without their
    base are averaged as changes: ``D = Σ w_i D_i / Σ w_i``.

    Args:
        tensors: W_i, one per model, of equal shape.
        weights: w_i, one per model.
        normalize: Divide by the sum of the weights.

    Returns:
        The average, in the inputs' shape.

    References:
        Wortsman et al., Model soups, arXiv:2203.05482.

    Example:
        >>> import torch
        >>> linear([torch.zeros(2), torch.ones(2)], weights=[1.0, 3.0])
        tensor([0.7500, 0.7500])
    """
    merged = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged.add_(tensor, alpha=weight)
    # Dividing last rounds once where the weights are whole numbers; scaling them first does not.
    return merged.div_(sum(weights)) if normalize else merged
