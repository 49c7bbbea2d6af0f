"""Keep the largest entries of each task vector and add them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from orthomerge.merging.parameters import Density
from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.trimming import magnitude_thresholds, trim

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["magnitude_prune"]


@merge_method(
    "magnitude-prune",
    space=Space.DELTA,
    reference="arXiv:1506.02626",
    survey=magnitude_thresholds,
    laws=("permutation", "scale-equivariance", "additive"),
)
def magnitude_prune(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    survey: Sequence[float],
    density: Density = 0.2,
    scale: float = 1.0,
    scope: Literal["tensor", "model"] = "tensor",
) -> Tensor:
    """Trim small changes of each task vector and add the weighted sum to the base.

    ``W = W_0 + λ Σ w_i T_i``, with ``T_i`` = D_i where ``|D_i|`` reaches its k-th largest value,
    k = ⌊density · numel⌋ and at least 1, and 0 elsewhere; what is kept is not rescaled. Entries
    equal to the threshold are kept, so the result does not depend on the order of equal values.

    Args:
        base: W_0.
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i, one per model.
        survey: Threshold of each model.
        density: Kept fraction of the entries of each task vector.
        scale: λ, multiplies the whole update.
        scope: Count the kept entries per tensor, or over the whole model.

    Returns:
        The merged weight.

    References:
        Han et al., Learning both weights and connections, arXiv:1506.02626, §3: the pruning, here
        of task vectors.

    Example:
        >>> import torch
        >>> deltas = [torch.tensor([1.0, -3.0]), torch.tensor([2.0, 1.0])]
        >>> magnitude_prune(torch.zeros(2), deltas, weights=[1.0, 1.0], survey=[3.0, 2.0])
        tensor([ 2., -3.])
    """
    del density, scope  # read by the survey
    merged = base.clone()
    for delta, weight, cut in zip(deltas, weights, survey, strict=True):
        merged.add_(trim(delta, cut), alpha=scale * weight)
    return merged
