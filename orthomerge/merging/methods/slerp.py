"""Spherical interpolation between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.streams import TensorStream

__all__ = ["slerp"]

_SMALLEST_SINE = 1e-6


def _angle(streams: Sequence[TensorStream], **_: Any) -> float:
    """Return the angle in radians between two flattened tensors; 0 when one of them is zero."""
    import torch

    dot = first = second = 0.0
    for a, b in zip(streams[0].chunks(), streams[1].chunks(), strict=True):
        a, b = a.double(), b.double()
        dot += torch.dot(a, b).item()
        first += torch.dot(a, a).item()
        second += torch.dot(b, b).item()
    if first == 0.0 or second == 0.0:
        return 0.0
    return math.acos(max(-1.0, min(1.0, dot / math.sqrt(first * second))))


@merge_method(
    "slerp",
    space=Space.WEIGHT,
    reference="Shoemake 1985, doi:10.1145/325165.325242",
    survey=_angle,
    min_models=2,
    max_models=2,
    laws=("idempotent", "permutation", "scale-equivariance"),
)
def slerp(
    tensors: Sequence[Tensor],
    *,
    survey: float,
    t: Annotated[float, Between(0, 1)] = 0.5,
) -> Tensor:
    """Interpolate between two models along the great circle through their tensors.

    ``W = sin((1-t)θ)/sin θ · W_1 + sin(tθ)/sin θ · W_2``, θ the angle between the flattened
    tensors, computed in fp64. Where the great circle is undefined (sin θ < 1e-6, or a zero
    tensor) the interpolation is linear.

    Args:
        tensors: W_1 and W_2.
        survey: θ in radians.
        t: 0 gives the first model, 1 the second.

    Returns:
        The interpolated weight.

    References:
        Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.

    Example:
        >>> import torch
        >>> slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], survey=torch.pi / 2)
        tensor([0.7071, 0.7071])
    """
    sine = math.sin(survey)
    if sine < _SMALLEST_SINE:
        first, second = 1.0 - t, t
    else:
        first, second = math.sin((1.0 - t) * survey) / sine, math.sin(t * survey) / sine
    return (tensors[0] * first).add_(tensors[1], alpha=second)
