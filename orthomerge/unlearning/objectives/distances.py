"""Distances that several objectives and retain losses share: of distributions, of hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.unlearning.objectives.scores import (
    IGNORED,
    lifted,
    position_mean,
    row_mean,
    scored_logits,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["hidden_distance", "kl_from_reference"]


def kl_from_reference(
    logits: Tensor, labels: Tensor, reference_logits: Tensor, *, compat: bool = False
) -> Tensor:
    """Return the mean of ``KL(p_ref ‖ p) = Σ_v p_ref (log p_ref - log p)`` over scored tokens.

    Its gradient at the reference itself is zero.

    Args:
        logits: [B, T, V] of the model.
        labels: [B, T].
        reference_logits: [B, T, V] of the reference.
        compat: Average over all B · T positions, prompts and padding included, as OpenUnlearning.

    >>> import torch
    >>> z = torch.randn(1, 3, 5)
    >>> kl_from_reference(z, torch.tensor([[-100, 1, 4]]), z).item()
    0.0
    """
    import torch

    if compat:
        values, reference = lifted(logits).flatten(0, 1), lifted(reference_logits).flatten(0, 1)
    else:
        values, _ = scored_logits(logits, labels)
        reference, _ = scored_logits(reference_logits, labels)
    divergences = torch.nn.functional.kl_div(
        values.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
    )
    return position_mean(divergences.sum(-1))


def hidden_distance(
    hidden: Tensor, target: Tensor, labels: Tensor, *, compat: bool = False
) -> Tensor:
    """Return the mean squared difference of hidden states at the answers' tokens.

    ``mean_v (h - h')²`` is averaged over the tokens of a row that are answer (there is no shift:
    the state is the token's own), then over the rows.

    Args:
        hidden: [B, T, d].
        target: [B, T, d], or [d] for one state that all are compared with.
        labels: [B, T]; rows without answer do not count.
        compat: Divide the sum of every row by the token count of each row and average over all
            B · B quotients, as OpenUnlearning.
    """
    mask = labels.to(hidden.device) != IGNORED
    squares = (lifted(hidden) - lifted(target).to(hidden.device)).square().mean(-1)
    counts = mask.sum(-1)
    sums = squares.new_zeros(squares.shape).masked_scatter(mask, squares[mask]).sum(-1)
    if compat:
        present = counts > 0
        return position_mean((sums[present] / counts[present, None]).flatten())
    return row_mean(sums / counts.clamp(min=1), counts)
