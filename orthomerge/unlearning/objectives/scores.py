"""What a model makes of the scored tokens of a batch: losses per token and per row, and means.

Labels are those of transformers: -100 marks a token that is not scored, and the logits at position
t score the label at t + 1, so that the first position is never scored. Half precision is lifted to
float32, after the unscored positions have been dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "IGNORED",
    "answer_rows",
    "answer_tokens",
    "lifted",
    "position_mean",
    "row_mean",
    "scored_logits",
    "sequence_losses",
    "token_losses",
    "token_mean",
]

#: The label of a token that is not scored.
IGNORED = -100


def lifted(values: Tensor) -> Tensor:
    """Return the values in float32, or in float64 where they are."""
    from orthomerge.linalg.precision import working_dtype

    return values.to(working_dtype(values))


def scored_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [N, V] that score a token, and the N tokens they score.

    Args:
        logits: [B, T, V], as the model gave them.
        labels: [B, T].

    >>> import torch
    >>> z, y = scored_logits(torch.zeros(1, 3, 5), torch.tensor([[-100, -100, 4]]))
    >>> z.shape, y.tolist()
    (torch.Size([1, 5]), [4])
    """
    targets = labels[:, 1:].to(logits.device)
    mask = targets != IGNORED
    return lifted(logits[:, :-1][mask]), targets[mask]


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``ℓ_t = -log p(y_t | y_<t)``, 0 where nothing is scored, and which are scored.

    Args:
        logits: [B, T, V], as the model gave them.
        labels: [B, T].

    Returns:
        Losses [B, T - 1] and a boolean mask of that shape; column t is about the token at t + 1.
    """
    import torch

    values, targets = scored_logits(logits, labels)
    losses = torch.nn.functional.cross_entropy(values, targets, reduction="none")
    mask = labels[:, 1:].to(logits.device) != IGNORED
    return losses.new_zeros(mask.shape).masked_scatter(mask, losses), mask


def sequence_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``S = Σ_t ℓ_t`` [B] and the number n [B] of scored tokens of every row.

    Args:
        logits: [B, T, V], as the model gave them.
        labels: [B, T].

    >>> import torch
    >>> S, n = sequence_losses(torch.zeros(1, 3, 5), torch.tensor([[-100, 1, 4]]))
    >>> round(S.item(), 4), n.item()
    (3.2189, 2)
    """
    losses, mask = token_losses(logits, labels)
    return losses.sum(-1), mask.sum(-1)


def position_mean(values: Tensor) -> Tensor:
    """Return the mean of values [N]; 0, with a gradient of 0, where there are none."""
    return values.sum() / max(values.numel(), 1)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values [B, T] over the positions of a mask; 0 where it is empty."""
    return position_mean(values[mask])


def row_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of one value per row over the rows that have scored tokens.

    Args:
        values: [B]; those of rows without scored tokens may be anything.
        counts: Scored tokens of each row [B].
    """
    return position_mean(values[counts > 0])


def answer_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return how many tokens of one set's batch are scored, as an integer tensor without axes.

    A loss that is a mean over tokens weighs the micro-batches of one optimiser step by this number
    when their gradients are to add up to the gradient of the whole batch.

    >>> import torch
    >>> answer_tokens({"labels": torch.tensor([[7, -100, 3], [7, 3, 3]])}).item()
    3
    """
    return (batch["labels"][:, 1:] != IGNORED).sum()


def answer_rows(batch: Mapping[str, Tensor]) -> Tensor:
    """Return how many rows of one set's batch have scored tokens; the weight of means over rows."""
    return (batch["labels"][:, 1:] != IGNORED).any(-1).sum()
