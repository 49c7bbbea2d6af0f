"""Drop entries of the task vectors at random, then elect a sign and merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthomerge.merging.parameters import Density
from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.dropping import dropped
from orthomerge.merging.steps.electing import elect_and_merge

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.draws import Draws

__all__ = ["dare_ties"]


@merge_method(
    "dare-ties",
    space=Space.DELTA,
    reference="arXiv:2311.03099",
    laws=("scale-equivariance", "additive"),
)
def dare_ties(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    draws: Draws,
    density: Density = 0.5,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Drop random entries, rescale, elect a sign per entry, average what agrees with it.

    With ``T_i = m_i ⊙ D_i / density``, m_i a random mask as in dare, and ``s = sign(Σ w_i T_i)``
    (0 counts as +): ``W = W_0 + λ Σ w_i T_i / Σ |w_i|``, both sums over the models whose
    ``w_i T_i`` is non-zero and has the sign s: ties with a random choice in place of the largest.

    Args:
        base: W_0.
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i, one per model.
        draws: Random numbers of the masks.
        density: Kept fraction of the entries, on average; 1 keeps all.
        scale: λ, multiplies the whole update.
        normalize: Divide by the weights that agree; otherwise their sum is added.

    Returns:
        The merged weight.

    References:
        Yu et al., Language Models are Super Mario, arXiv:2311.03099, §3.1, with the election of
        Yadav et al., TIES-Merging, arXiv:2306.01708, §3.

    Example:
        >>> import torch
        >>> from orthomerge.merging.draws import Draws
        >>> draws, deltas = Draws(0, "dare-ties", "w", ["a", "b"]), [torch.ones(2), -torch.ones(2)]
        >>> dare_ties(torch.zeros(2), deltas, weights=[1.0, 2.0], draws=draws, density=1.0)
        tensor([-1., -1.])
    """
    updates = [dropped(delta, draws, model, density) for model, delta in enumerate(deltas)]
    return elect_and_merge(base, updates, weights, scale=scale, normalize=normalize)
