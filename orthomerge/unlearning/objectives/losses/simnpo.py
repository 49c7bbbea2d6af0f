"""Negative preference optimisation without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import row_mean, sequence_losses

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["simnpo"]


@objective("simnpo", reference="arXiv:2410.07163", forget_weight=0.125, averages="rows")
def simnpo(
    logits: Tensor,
    labels: Tensor,
    *,
    beta: Annotated[float, Between(0, open_low=True)] = 4.5,
    margin: float = 0.0,
    compat: bool = False,
) -> Tensor:
    """Make the forget answers unlikely per token, with no model to compare with.

    ``L = -mean_rows (2/β) log σ(β S/n - margin)``: rows that are unlikely already hardly pull, and
    long answers do not pull more than short ones.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        beta: β, per nat of the mean token.
        margin: The paper's γ; larger pulls on after the answer is unlikely.
        compat: As OpenUnlearning, the margin is in nats: ``β (S/n - margin)``.

    Returns:
        The loss.

    References:
        Fan et al., Simplicity Prevails, arXiv:2410.07163, eq. 4.

    Example:
        >>> import torch
        >>> z, y = torch.zeros(1, 2, 4), torch.tensor([[-100, 3]])
        >>> round(simnpo(z, y, beta=1.0).item(), 4)
        0.4463
    """
    import torch

    scores, counts = sequence_losses(logits, labels)
    mean = scores / counts.clamp(min=1)
    argument = beta * (mean - margin) if compat else beta * mean - margin
    return row_mean(-2 / beta * torch.nn.functional.logsigmoid(argument), counts)
