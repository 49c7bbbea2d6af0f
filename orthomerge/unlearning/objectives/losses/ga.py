"""Gradient ascent on the forget set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import token_losses, token_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ga"]


@objective("ga", reference="arXiv:2210.01504", retain_weight=0.0)
def ga(logits: Tensor, labels: Tensor) -> Tensor:
    """Raise the loss of the forget set, without limit.

    ``L = -mean_t ℓ_t`` over all scored tokens of the batch. Nothing holds it back: it is to be
    stopped early, or projected.

    Args:
        logits: [B, T, V].
        labels: [B, T].

    Returns:
        The loss.

    References:
        Jang et al., Knowledge Unlearning for Mitigating Privacy Risks, arXiv:2210.01504, eq. 1.

    Example:
        >>> import torch
        >>> round(ga(torch.zeros(1, 2, 4), torch.tensor([[-100, 3]])).item(), 4)
        -1.3863
    """
    return -token_mean(*token_losses(logits, labels))
