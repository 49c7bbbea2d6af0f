"""Drop entries of the task vectors at random, rescale the rest, add them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthomerge.merging.parameters import Density
from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.dropping import dropped

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.draws import Draws

__all__ = ["dare"]


@merge_method(
    "dare",
    space=Space.DELTA,
    reference="arXiv:2311.03099",
    laws=("scale-equivariance", "additive"),
)
def dare(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    draws: Draws,
    density: Density = 0.5,
    scale: float = 1.0,
) -> Tensor:
    """Drop random entries of each task vector, rescale what is kept, add the sum to the base.

    ``W = W_0 + λ Σ w_i m_i ⊙ D_i / density``, every entry of the mask m_i 1 with probability
    ``density`` and 0 otherwise, independently. Over the masks the mean of W is that of
    task-arithmetic, and each entry's variance ``(1/density - 1) λ² Σ (w_i D_i)²``.

    Args:
        base: W_0.
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i, one per model.
        draws: Random numbers of the masks.
        density: Kept fraction of the entries, on average; 1 keeps all.
        scale: λ, multiplies the whole update.

    Returns:
        The merged weight.

    References:
        Yu et al., Language Models are Super Mario, arXiv:2311.03099, §3.1.

    Example:
        >>> import torch
        >>> from orthomerge.merging.draws import Draws
        >>> draws = Draws(0, "dare", "w", ["a"])
        >>> dare(torch.zeros(4), [torch.ones(4)], weights=[1.0], draws=draws)
        tensor([0., 2., 2., 0.])
    """
    merged = base.clone()
    for model, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        merged.add_(dropped(delta, draws, model, density), alpha=scale * weight)
    return merged
