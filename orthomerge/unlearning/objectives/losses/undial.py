"""Self-distillation with adjusted logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import IGNORED, lifted, position_mean, scored_logits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["undial"]


@objective("undial", reference="arXiv:2402.10052", retain_weight=0.0)
def undial(
    logits: Tensor,
    labels: Tensor,
    reference_logits: Tensor,
    *,
    beta: Annotated[float, Between(0)] = 10.0,
    compat: bool = False,
) -> Tensor:
    """Distil the starting model with the forgotten tokens' logits lowered.

    ``L = mean_t CE(softmax(z^ref - β onehot(y_t)), z)`` over the scored tokens: a fixed goal, so it
    neither diverges nor needs a retain loss.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        reference_logits: [B, T, V].
        beta: β, by how much the logit of the token to forget is lowered.
        compat: As OpenUnlearning, average over all positions but the last, prompts and padding
            included; there the label -100 lowers the token V - 100 (none where V < 100, which
            OpenUnlearning cannot do).

    Returns:
        The loss.

    References:
        Dong et al., UNDIAL, arXiv:2402.10052, eq. 2-3.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2, 4)
        >>> round(undial(z, torch.tensor([[-100, 3]]), z).item(), 4)
        1.3863
    """
    import torch

    if compat:
        values, reference, targets = _all_positions(logits, labels, reference_logits)
    else:
        values, targets = scored_logits(logits, labels)
        reference, _ = scored_logits(reference_logits, labels)
    lowered = torch.nn.functional.one_hot(targets.clamp(min=0), values.shape[-1])
    lowered = lowered * (targets >= 0)[:, None]
    goal = (reference - beta * lowered).softmax(-1)
    return position_mean(torch.nn.functional.cross_entropy(values, goal, reduction="none"))


def _all_positions(
    logits: Tensor, labels: Tensor, reference_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all positions but the last, and which token is lowered: below 0, none."""
    targets = labels[:, 1:].to(logits.device).flatten()
    targets = targets.where(targets != IGNORED, logits.shape[-1] + IGNORED)
    values, reference = lifted(logits[:, :-1]), lifted(reference_logits[:, :-1])
    return values.flatten(0, 1), reference.flatten(0, 1), targets
