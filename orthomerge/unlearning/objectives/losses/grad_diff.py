"""Gradient ascent on the forget set, descent on the retain set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import token_losses, token_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["grad_diff"]


@objective("grad-diff", reference="arXiv:2203.12817")
def grad_diff(logits: Tensor, labels: Tensor) -> Tensor:
    """Raise the loss of the forget set while lowering that of the retain set.

    ``L = -mean_t ℓ_t`` over all scored tokens of the batch, as ``ga``, with a retain loss of equal
    weight beside it.

    Args:
        logits: [B, T, V].
        labels: [B, T].

    Returns:
        The loss.

    References:
        Liu et al., Continual Learning and Private Unlearning, arXiv:2203.12817; as baseline in
        TOFU, arXiv:2401.06121, §3.

    Example:
        >>> import torch
        >>> round(grad_diff(torch.zeros(1, 2, 4), torch.tensor([[-100, 3]])).item(), 4)
        -1.3863
    """
    return -token_mean(*token_losses(logits, labels))
