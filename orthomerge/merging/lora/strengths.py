"""How strong an update is as a whole, for what goes along with factors: magnitudes and biases.

From parameters only; what else a method does to the factors is its own business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orthomerge.merging.nesting import nested_choices
from orthomerge.merging.registry import MergeMethod

__all__ = ["update_strength"]


def update_strength(
    method: MergeMethod,
    parameters: Mapping[str, Any],
    weights: Sequence[float],
    *,
    measured: float | None = None,
) -> float | None:
    """Return c where the update is like ``c Σ w_i D_i``; None where only the factors can tell.

    The product of the scales λ of the method and of those nested in it, each divided by the sum of
    the weights if it does so, or by that of their sizes if it averages what agrees.

    Args:
        method: The method.
        parameters: Its parameters.
        weights: w_i of the models that take part.
        measured: The outer λ, where it was left to the method.

    >>> from orthomerge.merging.registry import get_method
    >>> update_strength(get_method("knots"), {"op": {"method": "ties", "scale": 0.5}}, [1.0, 1.0])
    0.25
    """
    strength = 1.0
    for each, given in [(method, parameters), *nested_choices(method, parameters, deep=True)]:
        settings = each.resolved(given, len(weights)) if each.resolved else given
        scale = settings.get("scale", 1.0)
        if each is method and measured is not None:
            scale, measured = measured, None
        if not isinstance(scale, int | float):
            return None
        strength *= scale
        if each.needs_weight_sum(given):
            strength /= sum(weights)
        elif given.get("normalize"):
            strength /= sum(map(abs, weights)) or 1.0
    return strength
