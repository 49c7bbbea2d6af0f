"""Fine-tuning on refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import token_losses, token_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["idk"]


@objective("idk", reference="arXiv:2401.06121")
def idk(alternate_logits: Tensor, alternate_labels: Tensor) -> Tensor:
    """Teach the model to answer the forget questions otherwise, by plain fine-tuning.

    ``L = mean_t ℓ_t`` over the tokens of the alternate answers, such as "I don't know". It does not
    look at the answers to forget, which stay likely when they are asked for in another way; ``dpo``
    pushes them down as well. The original code averages over the tokens of these and the retain
    rows together; here the two means are weighted by γ and α.

    Args:
        alternate_logits: [B, T', V]; row i answers the forget row i's question otherwise.
        alternate_labels: [B, T'].

    Returns:
        The loss.

    References:
        Maini et al., TOFU, arXiv:2401.06121, §3, "preference optimization" and its code's idk.

    Example:
        >>> import torch
        >>> round(idk(torch.zeros(1, 2, 4), torch.tensor([[-100, 3]])).item(), 4)
        1.3863
    """
    return token_mean(*token_losses(alternate_logits, alternate_labels))
