"""Cross-entropy unlearning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import IGNORED, position_mean, scored_logits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ceu"]


@objective("ceu", reference="arXiv:2503.01224", retain_weight=0.0, skips="skip")
def ceu(logits: Tensor, labels: Tensor, *, skip: Annotated[int, Between(0)] = 1) -> Tensor:
    """Train towards the model's own distribution without the token to forget.

    ``L = mean_t CE(softmax(sg(z) with z_y = -∞), z)`` over the scored tokens but the first ones of
    every answer; sg(·) is without gradient. The goal moves with the model, and the pull of a token
    vanishes as it becomes unlikely.

    Args:
        logits: [B, T, V], V at least 2.
        labels: [B, T].
        skip: How many first tokens of every answer are left out; they say little of what it is.

    Returns:
        The loss.

    References:
        Yang, CE-U: Cross Entropy Unlearning, arXiv:2503.01224, §3.

    Example:
        >>> import torch
        >>> round(ceu(torch.zeros(1, 2, 4), torch.tensor([[-100, 3]]), skip=0).item(), 4)
        1.3863
    """
    import torch

    scored = labels[:, 1:] != IGNORED
    late = torch.nn.functional.pad(scored & (scored.cumsum(-1) > skip), (1, 0))
    values, targets = scored_logits(logits, labels.where(late, IGNORED))
    goal = values.detach().scatter(-1, targets[:, None], -torch.inf).softmax(-1)
    return position_mean(torch.nn.functional.cross_entropy(values, goal, reduction="none"))
