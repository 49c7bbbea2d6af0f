"""Check method parameters and weights by themselves, before any source is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from orthomerge.errors import OrthoMergeError, RecipeError, UnknownNameError
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.rules import check_value

__all__ = ["check_parameters"]


def check_parameters(
    method: MergeMethod,
    parameters: Mapping[str, Any],
    weights: tuple[Any, ...] | None,
    model_count: int | None = None,
) -> list[OrthoMergeError]:
    """Return everything wrong with parameter values and weights, without looking at tensors."""
    problems: list[OrthoMergeError] = []
    for name, value in parameters.items():
        if name not in method.parameters:
            problems.append(
                UnknownNameError(f"parameter of {method.name}", name, method.parameters)
            )
        else:
            check = method.parameters[name].check
            problems += check_value(value, check, f"parameter '{name}'")
    if weights is not None and not method.uses_weights:
        problems.append(
            RecipeError(
                f"{method.name} takes no weights", remedy="Remove them; see its parameters."
            )
        )
        return problems
    if weights is not None and model_count is not None and len(weights) != model_count:
        problems.append(
            RecipeError("one weight per model", expected=model_count, found=len(weights))
        )
    for position, weight in enumerate(weights or ()):
        where = f"the weight of model {position + 1}"
        problems += check_value(weight, partial(_check_weight, method, where), where)
    return problems


def _check_weight(method: MergeMethod, where: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise RecipeError(f"{where} must be a finite number", found=repr(value))
    if value < 0 and not method.negative_weights:
        raise RecipeError(f"{where} must not be negative for {method.name}", found=value)
    return float(value)
