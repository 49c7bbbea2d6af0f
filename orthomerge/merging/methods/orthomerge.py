"""Magnitude-corrected average of rotations in the Lie algebra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["orthomerge"]


@merge_method(
    "orthomerge",
    space=Space.ROTATION,
    reference="arXiv:2602.05943",
    laws=("identity", "idempotent", "permutation", "scale-equivariance"),
    negative_weights=False,
    divides_by_weight_sum=True,
    dense="orthomerge-decoupled",
)
def orthomerge(
    rotations: Sequence[Tensor],
    *,
    weights: Sequence[float],
    strength: float = 1.0,
    correction: Literal["layer", "block", "none"] = "layer",
    c_max: Annotated[float, Between(1, infinite=True)] = math.inf,
    zero_guard: Annotated[float, Between(0, 0.5)] = 1e-6,
) -> Tensor:
    """Average rotations in the Lie algebra so(b) and restore their mean magnitude.

    With weights normalised to sum 1, ``S = Σ w_i A_i`` and ``m = Σ w_i ‖A_i‖_F``:
    ``A = g · min(m/‖S‖_F, c_max) · S``, and ``A = 0`` where ``‖S‖_F <= zero_guard · m``.
    The correction ``c = m/‖S‖_F`` is 1 for aligned experts and √T for T unrelated ones.

    Args:
        rotations: A_i, skew blocks ``[blocks, b, b]`` with ``W_i = W_0 · Cayley(A_i)``.
        weights: w_i >= 0, one per model.
        strength: g, multiplies the merged generator.
        correction: One factor c per layer (the paper), one per block, or none (c = 1).
        c_max: Largest factor; bounds the noise that near-opposite experts would amplify.
        zero_guard: Relative size of S below which the experts are taken to cancel.

    Returns:
        The merged generator A, of the rotations' shape.

    References:
        Orthogonal Model Merging, arXiv:2602.05943: magnitude-corrected merging of OFT adapters.

    Example:
        >>> import torch
        >>> a = torch.tensor([[[0.0, 0.3], [-0.3, 0.0]]])
        >>> orthomerge([a, 2 * a], weights=[1.0, 1.0])[0, 0, 1]
        tensor(0.4500)
    """
    import torch

    from orthomerge.linalg.means import merge_algebra

    merged, _ = merge_algebra(
        torch.stack(list(rotations)),
        weights,
        strength=strength,
        correction=correction,
        c_max=c_max,
        zero_guard=zero_guard,
    )
    return merged
