"""Negative preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import row_mean, sequence_losses

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["npo"]


@objective("npo", reference="arXiv:2404.05868", averages="rows")
def npo(
    logits: Tensor,
    labels: Tensor,
    reference_scores: Tensor,
    *,
    beta: Annotated[float, Between(0, open_low=True)] = 0.1,
) -> Tensor:
    """Make the forget answers less likely than they were, ever more gently.

    ``L = -mean_rows (2/β) log σ(β (S - S^ref))``. For β -> 0 it is gradient ascent; for larger β a
    row stops to pull once its loss is a few 1/β above where it started.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        reference_scores: S^ref [B].
        beta: β, per nat of a whole answer; smaller forgets further.

    Returns:
        The loss.

    References:
        Zhang et al., Negative Preference Optimization, arXiv:2404.05868, eq. 3.

    Example:
        >>> import torch
        >>> z, y = torch.zeros(1, 2, 4), torch.tensor([[-100, 3]])
        >>> round(npo(z, y, torch.zeros(1), beta=1.0).item(), 4)
        0.4463
    """
    import torch

    scores, counts = sequence_losses(logits, labels)
    rise = scores - reference_scores.to(scores)
    return row_mean(-2 / beta * torch.nn.functional.logsigmoid(beta * rise), counts)
