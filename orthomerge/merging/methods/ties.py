"""Trim, elect sign and merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from orthomerge.merging.parameters import Density
from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.electing import elect_and_merge
from orthomerge.merging.steps.trimming import magnitude_thresholds, trim

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ties"]


@merge_method(
    "ties",
    space=Space.DELTA,
    reference="arXiv:2306.01708",
    survey=magnitude_thresholds,
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
    del density, scope  # read by the survey
    trimmed = [trim(delta, cut) for delta, cut in zip(deltas, survey, strict=True)]
    return elect_and_merge(base, trimmed, weights, scale=scale, normalize=normalize)
