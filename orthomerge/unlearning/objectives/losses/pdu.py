"""Primal-dual unlearning: flat logits, under a bound on the retain loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.registry import objective
from orthomerge.unlearning.objectives.scores import IGNORED, lifted, position_mean, scored_logits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pdu"]


@objective("pdu", reference="arXiv:2506.05314", dual=True, required=("tolerance",))
def pdu(
    logits: Tensor,
    labels: Tensor,
    *,
    tolerance: Annotated[float | None, Between(0)] = None,
    dual_step: Annotated[float, Between(0)] = 1.0,
    warmup_epochs: Annotated[float, Between(0)] = 5.0,
    update: Literal["step", "epoch"] = "step",
    compat: bool = False,
) -> Tensor:
    """Flatten the forget set's logits while the retain loss stays within a bound.

    ``L = mean_t (max_v z - mean_v z)²`` over the scored tokens, which is 0 for equal logits. The
    whole is ``γ L + λ (L_r - ε)``, and ``λ <- max(0, λ + η (L_r - ε))`` where ``α`` stands
    elsewhere, from the measured L_r.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        tolerance: ε, what the retain loss may be; must be given, for instance 1.1 times the loss of
            the starting model.
        dual_step: η, how fast λ follows.
        warmup_epochs: For so many epochs λ stays at retain_weight.
        update: Move λ with the loss of every step, or with the mean of an epoch's steps.
        compat: As OpenUnlearning, take the logits at the answers' tokens, not those that score
            them.

    Returns:
        The loss.

    References:
        Entesari et al., Constrained Entropic Unlearning, arXiv:2506.05314, §3.

    Example:
        >>> import torch
        >>> pdu(torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]), torch.tensor([[-100, 1]])).item()
        1.0
    """
    del tolerance, dual_step, warmup_epochs, update  # read by the dual variable
    if compat:
        values = lifted(logits[labels.to(logits.device) != IGNORED])
    else:
        values, _ = scored_logits(logits, labels)
    return position_mean((values.amax(-1) - values.mean(-1)).square())
