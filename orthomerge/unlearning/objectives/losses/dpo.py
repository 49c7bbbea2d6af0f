"""Direct preference optimisation: another answer rather than the one to forget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import row_mean, sequence_losses

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dpo"]


@objective("dpo", reference="arXiv:2305.18290", averages="rows", aliases=("idk-dpo",))
def dpo(
    logits: Tensor,
    labels: Tensor,
    reference_scores: Tensor,
    alternate_logits: Tensor,
    alternate_labels: Tensor,
    alternate_reference_scores: Tensor,
    *,
    beta: Annotated[float, Between(0, open_low=True)] = 0.1,
) -> Tensor:
    """Prefer another answer, such as a refusal, to the one to forget.

    ``L = -mean_rows (2/β) log σ(β (r_w - r_l))`` with the log ratios ``r = S^ref - S`` of the
    alternate answer (w) and of the one to forget (l). What the other answer is, is up to the data:
    the row's own, or a refusal (known as IdkDPO). Its sibling ``idk`` learns the refusal and does
    not look at the answer to forget.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        reference_scores: S^ref [B].
        alternate_logits: [B, T', V]; row i answers the forget row i's question otherwise.
        alternate_labels: [B, T'].
        alternate_reference_scores: S^ref of the alternate answers [B].
        beta: β, per nat of a whole answer.

    Returns:
        The loss; 2/β times that of the DPO paper, so that its size compares with ``npo``.

    References:
        Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, eq. 7; for unlearning in
        TOFU, arXiv:2401.06121, §3.

    Example:
        >>> import torch
        >>> z, y, s = torch.zeros(1, 2, 4), torch.tensor([[-100, 3]]), torch.zeros(1)
        >>> round(dpo(z, y, s, z, y, s, beta=1.0).item(), 4)
        1.3863
    """
    import torch

    lost, lost_counts = sequence_losses(logits, labels)
    won, won_counts = sequence_losses(alternate_logits, alternate_labels)
    lost_ratio = reference_scores.to(lost) - lost
    won_ratio = alternate_reference_scores.to(won) - won
    losses = -2 / beta * torch.nn.functional.logsigmoid(beta * (won_ratio - lost_ratio))
    return row_mean(losses, lost_counts * won_counts)
