"""Representation misdirection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from orthomerge.parameters import Between
from orthomerge.unlearning.objectives.distances import hidden_distance
from orthomerge.unlearning.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["rmu"]


@objective("rmu", reference="arXiv:2403.03218", retain="hidden", averages="rows")
def rmu(
    hidden: Tensor,
    labels: Tensor,
    direction: Tensor,
    *,
    steering: Annotated[float, Between(0, open_low=True)] = 2.0,
    layer: Annotated[int | None, Between(0)] = None,
    seed: Annotated[int, Between(0)] = 0,
    compat: bool = False,
) -> Tensor:
    """Steer the forget set's hidden states towards a fixed random direction.

    ``L = mean_rows mean_t mean_v (h_t - c u)²`` over the answers' tokens, with h the states after
    one layer and ``u = U[0, 1)^d / ‖·‖`` drawn once. Its retain loss ``hidden`` keeps the states of
    the retain set where the starting model has them. Neither reaches parameters above the layer;
    the paper trains the MLPs' down-projections of this layer and the two below it.

    Args:
        hidden: [B, T, d].
        labels: [B, T].
        direction: u [d].
        steering: c, the norm of the states' goal; larger than the states' own norm forgets harder.
        layer: Which layer's output, counted from 0; null for the last of the first quarter of the
            model: 7 of 32.
        seed: Draws u.
        compat: As OpenUnlearning, divide every row's sum by every row's number of tokens.

    Returns:
        The loss.

    References:
        Li et al., The WMDP Benchmark, arXiv:2403.03218, §4.

    Example:
        >>> import torch
        >>> rmu(torch.zeros(1, 2, 4), torch.tensor([[-100, 3]]), torch.ones(4)).item()
        4.0
    """
    del layer, seed  # read by whoever makes the states and the direction
    return hidden_distance(hidden, steering * direction, labels, compat=compat)
