"""Trim, elect sign and merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from orthomerge.merging.parameters import Density
from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.streams import TensorStream

__all__ = ["ties"]

_TINY = 1e-30  # keeps 0/0 at entries where no model agrees at 0


def _thresholds(streams: Sequence[TensorStream], *, density: float, **_: Any) -> list[float]:
    """Return each model's k-th largest magnitude, k = ⌊density · numel⌋, at least 1."""
    from orthomerge.linalg.selection import kth_largest_magnitudes

    if density == 1.0:
        return [0.0] * len(streams)
    counts = [max(1, math.floor(density * stream.numel + 1e-9)) for stream in streams]
    return kth_largest_magnitudes(streams, counts)


@merge_method(
    "ties",
    space=Space.DELTA,
    reference="arXiv:2306.01708",
    survey=_thresholds,
    laws=("permutation", "scale-equivariance", "additive"),
)
def ties(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    survey: Sequence[float],
    density: Density = 0.2,
    scale: float = 1.0,
    normalize: bool = True,
    scope: Literal["tensor", "model"] = "tensor",
) -> Tensor:
    """Trim small changes, elect a sign per entry, average what agrees with it.

    With ``T_i`` = D_i where ``|D_i|`` reaches its k-th largest value and 0 elsewhere, and
    ``s = sign(Σ w_i T_i)`` (0 counts as +): ``W = W_0 + λ Σ w_i T_i / Σ |w_i|``, both sums over
    the models whose ``w_i T_i`` is non-zero and has the sign s. Entries equal to the threshold
    are kept, so the result does not depend on the order of equal values.

    Args:
        base: W_0.
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i, one per model.
        survey: Threshold of each model.
        density: Kept fraction of the entries of each task vector.
        scale: λ, multiplies the whole update.
        normalize: Divide by the weights that agree (the paper); otherwise their sum is added.
        scope: Count the kept entries per tensor, or over the whole model as in the paper.

    Returns:
        The merged weight.

    References:
        Yadav et al., TIES-Merging, arXiv:2306.01708, §3.

    Example:
        >>> import torch
        >>> deltas = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
        >>> ties(torch.zeros(2), deltas, weights=[1.0, 1.0], survey=[0.0, 0.0])
        tensor([2., 2.])
    """
    import torch

    del density, scope  # read by the survey
    updates = [_trim(d, cut) for d, cut in zip(deltas, survey, strict=True)]
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


def _trim(delta: Tensor, threshold: float) -> Tensor:
    """Return a new tensor: delta with entries of magnitude below the threshold set to zero."""
    import torch

    if threshold == 0.0:
        return delta.clone()
    edge = torch.tensor(threshold, dtype=delta.dtype)
    below = torch.nextafter(edge, torch.zeros_like(edge)).item()
    # hardshrink keeps |x| > below, i.e. |x| >= threshold, several times faster than torch.where
    return torch.nn.functional.hardshrink(delta, below)
