"""Drop entries at random, small ones more often; then elect a sign and merge what agrees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from orthomerge.errors import RecipeError
from orthomerge.merging.parameters import Density
from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.dropping import dropped_by_rank
from orthomerge.merging.steps.electing import elect_and_merge
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.draws import Draws

__all__ = ["della"]

_ROWS_AT_A_TIME = 16 << 20  # float32 elements that ranking some rows takes, at most


def _workspace(shape: tuple[int, ...], models: int) -> int:
    """Return the float32 elements held: what each model keeps, both sums, the rows in work."""
    numel = math.prod(shape)
    return (models + 3) * numel + min(16 * numel, max(_ROWS_AT_A_TIME, 16 * shape[-1]))


def _unfit(shape: tuple[int, ...], role: str, parameters: Mapping[str, Any]) -> str | None:
    """Return why these settings make no probabilities, or None."""
    del shape, role
    density, epsilon = parameters["density"], parameters["epsilon"]
    if density - epsilon > 0 and density + epsilon <= 1:
        return None
    return (
        f"density ± epsilon must be probabilities above 0 and up to 1, found {density:g} ± "
        f"{epsilon:g}; at this density epsilon must be below {min(density, 1 - density):g}"
    )


@merge_method(
    "della",
    space=Space.DELTA,
    reference="arXiv:2406.11617",
    laws=("scale-equivariance", "additive"),
    whole=True,
    workspace=_workspace,
    unfit=_unfit,
)
def della(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    draws: Draws,
    role: str = "linear",
    density: Density = 0.5,
    epsilon: Annotated[float, Between(0, 0.5)] = 0.15,
    rescale: Literal["probability", "norm"] = "probability",
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Drop random entries, the smaller the likelier, rescale, elect a sign, add what agrees.

    The k-th smallest of the n magnitudes in a row of D_i is kept with probability
    ``p = density - ε + 2 ε (k - 1) / (n - 1)``, equal magnitudes with that of their mean rank.
    ``T_i = m_i ⊙ D_i / p`` with the mask m_i, or with ``rescale: norm``
    ``T_i = m_i ⊙ D_i · ‖D_i‖₁ / ‖m_i ⊙ D_i‖₁``; ``s = sign(Σ w_i T_i)`` (0 counts as +) and
    ``W = W_0 + λ Σ w_i T_i`` over the models whose ``w_i T_i`` has the sign s. A vector is one row,
    a convolution kernel is seen as [out, in · kh · kw].

    Args:
        base: W_0.
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i, one per model.
        draws: Random numbers of the masks.
        role: What the tensor is in the model.
        density: Kept fraction of the entries, on average.
        epsilon: ε, how much likelier the largest and how much less likely the smallest is kept.
        rescale: By the probability of each entry (the paper), which keeps the mean over the masks,
            or so that each task vector's L1 norm in this tensor stays.
        scale: λ, multiplies the whole update.
        normalize: Divide by the weights that agree, as ties does.

    Returns:
        The merged weight.

    Raises:
        RecipeError: density ± epsilon are no probabilities.

    References:
        Deep et al., DELLA-Merging, arXiv:2406.11617, §3.

    Example:
        >>> import torch
        >>> from orthomerge.merging.draws import Draws
        >>> draws = Draws(0, "della", "w", ["a"])
        >>> della(torch.zeros(1, 2), [torch.ones(1, 2)], weights=[1.0], draws=draws)
        tensor([[0., 2.]])
    """
    unfit = _unfit(tuple(base.shape), role, {"density": density, "epsilon": epsilon})
    if unfit:
        raise RecipeError(unfit)
    updates = []
    for model, delta in enumerate(deltas):
        rows = _rows(delta, role)
        kept = dropped_by_rank(rows, draws, model, density, epsilon, rescale)
        updates.append(kept.reshape(base.shape))
    return elect_and_merge(base, updates, weights, scale=scale, normalize=normalize)


def _rows(delta: Tensor, role: str) -> Tensor:
    """Return the tensor as a matrix of the rows in which magnitudes are ranked."""
    if delta.ndim < 2:
        return delta.reshape(1, -1)
    if role == "stack":
        return delta.reshape(-1, delta.shape[-1])
    return delta.reshape(delta.shape[0], math.prod(delta.shape[1:]))
