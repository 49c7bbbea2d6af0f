"""Gradient ascent weighted by saturation and importance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import token_losses, token_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["satimp"]


@objective("satimp", reference="arXiv:2505.11953", forget_weight=0.1)
def satimp(
    logits: Tensor,
    labels: Tensor,
    *,
    beta1: Annotated[float, Between(0)] = 5.0,
    beta2: Annotated[float, Between(0)] = 1.0,
) -> Tensor:
    """Raise the loss of the forget set's tokens that are likely but not certain.

    ``L = -mean_t sg(p_t^β1 (1 - p_t)^β2) ℓ_t`` with ``p_t = exp(-ℓ_t)`` and sg(·) without gradient:
    the first factor leaves out what is forgotten already, the second what any text would say there.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        beta1: β1, saturation: how much less an unlikely token counts.
        beta2: β2, importance: how much less a certain token counts.

    Returns:
        The loss.

    References:
        Yang et al., Exploring Criteria of Loss Reweighting, arXiv:2505.11953, §5.

    Example:
        >>> import torch
        >>> z, y = torch.zeros(1, 2, 4), torch.tensor([[-100, 3]])
        >>> round(satimp(z, y, beta1=1.0).item(), 4)
        -0.2599
    """
    losses, mask = token_losses(logits, labels)
    known = losses.detach()
    weights = (-beta1 * known).exp() * (-(-known).expm1()) ** beta2
    return -token_mean(weights * losses, mask)
