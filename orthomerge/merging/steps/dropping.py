"""Drop entries of a task vector at random: all alike, or the small ones more often.

The random numbers come from ``draws``; what becomes of the kept entries is each method's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.draws import Draws

__all__ = ["dropped", "dropped_by_rank", "mean_ranks"]

_ENTRIES_AT_A_TIME = 1 << 20  # bounds the memory that sorting takes


def dropped(delta: Tensor, draws: Draws, model: int, density: float) -> Tensor:
    """Return ``m ⊙ D / density``, m 1 with probability ``density``, as a new tensor.

    >>> import torch
    >>> from orthomerge.merging.draws import Draws
    >>> dropped(torch.ones(4), Draws(0, "dare", "w", ["a"]), 0, 0.5)
    tensor([0., 2., 2., 0.])
    """
    if density == 1.0:
        return delta.clone()
    lost = draws.uniform(model, delta) >= density
    return (delta / density).masked_fill_(lost, 0.0)


def dropped_by_rank(
    delta: Tensor, draws: Draws, model: int, density: float, epsilon: float, rescale: str
) -> Tensor:
    """Return a new tensor: delta with entries dropped by the rank of their magnitude, rescaled.

    Args:
        delta: D [rows, n].
        draws: Random numbers.
        model: Position of the model among those that draw.
        density: Probability of an entry of middle rank to be kept.
        epsilon: What the largest of a row has more, and the smallest less.
        rescale: ``probability`` divides each entry by its own probability, ``norm`` multiplies all
            such that the L1 norm stays.
    """
    kept = delta.clone()
    rows, width = delta.shape
    step = max(1, _ENTRIES_AT_A_TIME // max(1, width))
    for first in range(0, rows, step):
        block = kept[first : first + step]
        # Towards 0 for the smallest, 1 for the largest, 1/2 for the only one.
        share = mean_ranks(block.abs()).sub_(1).div_(width - 1) if width > 1 else block * 0 + 0.5
        probability = share.mul_(2 * epsilon).add_(density - epsilon)
        lost = draws.uniform(model, block, first * width) >= probability
        if rescale == "probability":
            block.div_(probability)
        block.masked_fill_(lost, 0.0)
    if rescale == "norm":
        before, after = delta.double().abs().sum(), kept.double().abs().sum()
        if after > 0:  # else nothing is left to be rescaled
            kept.mul_((before / after).to(kept.dtype))
    return kept


def mean_ranks(values: Tensor) -> Tensor:
    """Return each entry's rank in its row, 1 for the smallest; equal entries share their mean.

    So that ranks do not depend on how a sort orders equal values; values [..., n].

    >>> import torch
    >>> mean_ranks(torch.tensor([[5.0, 2.0, 5.0, 1.0]]))
    tensor([[3.5000, 2.0000, 3.5000, 1.0000]])
    """
    import torch

    ordered, order = values.sort(dim=-1)
    width = values.shape[-1]
    place = torch.arange(width, device=values.device).expand(ordered.shape)
    edge = torch.ones_like(ordered, dtype=torch.bool)
    edge[..., 1:] = ordered[..., 1:] != ordered[..., :-1]  # where a run of equal values begins
    first = torch.where(edge, place, 0).cummax(dim=-1).values
    ends = edge.roll(-1, dims=-1)
    last = torch.where(ends, place, width).flip(-1).cummin(dim=-1).values.flip(-1)
    ranks = (first + last).to(values.dtype).div_(2).add_(1)
    return torch.empty_like(values).scatter_(-1, order, ranks)
