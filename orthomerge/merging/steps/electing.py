"""Let the models elect a sign for every entry, and merge those that agree with it.

What the models bring to the election (trimmed, dropped, rescaled) is each method's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["elect_and_merge"]

_TINY = 1e-30  # keeps 0/0 at entries where no model agrees at 0


def elect_and_merge(
    base: Tensor,
    updates: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float,
    normalize: bool,
) -> Tensor:
    """Return the base plus what agrees with the elected sign.

    ``s = sign(Σ w_i T_i)``, entry by entry, 0 counts as +;
    ``W = W_0 + λ Σ w_i T_i / Σ |w_i|``, both sums over the models whose ``w_i T_i`` is non-zero and
    has the sign s.

    Args:
        base: W_0.
        updates: T_i, one per model, of the base's shape; they are overwritten.
        weights: w_i, one per model.
        scale: λ.
        normalize: Divide by the sum of the weights that agree.

    Returns:
        A new tensor.

    References:
        Yadav et al., TIES-Merging, arXiv:2306.01708, §3.

    Example:
        >>> import torch
        >>> updates = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
        >>> elect_and_merge(torch.zeros(2), updates, [1.0, 1.0], scale=1.0, normalize=False)
        tensor([4., 2.])
    """
    import torch

    for update, weight in zip(updates, weights, strict=True):
        if weight != 1.0:
            update.mul_(weight)
    sign = sum(updates[1:], updates[0]).sign().add_(0.5).sign_()
    merged, agreeing = torch.zeros_like(base), torch.zeros_like(base)
    for update, weight in zip(updates, weights, strict=True):
        update.mul_(sign).relu_()  # the magnitude where it agrees, 0 where it does not
        merged.add_(update)
        agreeing.add_(update.sign_(), alpha=abs(weight))
    if normalize:
        merged.div_(agreeing.clamp_min_(_TINY))
    return torch.addcmul(base, merged, sign, value=scale)
