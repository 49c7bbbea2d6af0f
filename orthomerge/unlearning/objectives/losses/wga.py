"""Weighted gradient ascent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import token_losses, token_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["wga"]


@objective("wga", reference="arXiv:2502.19301")
def wga(logits: Tensor, labels: Tensor, *, beta: Annotated[float, Between(0)] = 1.0) -> Tensor:
    """Raise the loss of the forget set, of tokens that are still likely most.

    ``L = -mean_t sg(p_t^β) ℓ_t`` with ``p_t = exp(-ℓ_t)`` and sg(·) without gradient: a token that
    is unlikely already hardly pulls. At β = 0 it is gradient ascent.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        beta: β, how much less an unlikely token counts.

    Returns:
        The loss.

    References:
        Wang et al., Rethinking LLM Unlearning Objectives, arXiv:2502.19301, §4.

    Example:
        >>> import torch
        >>> round(wga(torch.zeros(1, 2, 4), torch.tensor([[-100, 3]])).item(), 4)
        -0.3466
    """
    losses, mask = token_losses(logits, labels)
    weights = (-beta * losses.detach()).exp()
    return -token_mean(weights * losses, mask)
