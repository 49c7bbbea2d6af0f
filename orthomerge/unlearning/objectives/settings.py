"""From what a recipe says of an objective to one with every setting decided and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orthomerge.errors import OrthoMergeError, RecipeError, UnknownNameError, combined
from orthomerge.unlearning.objectives.registry import RETAIN_LOSSES, ObjectiveInfo

if TYPE_CHECKING:
    from orthomerge.unlearning.objectives.bound import Objective

__all__ = ["decided"]


def decided(
    info: ObjectiveInfo,
    compat: bool,
    retain: str | None,
    forget_weight: float | None,
    retain_weight: float | None,
    parameters: Mapping[str, Any],
) -> Objective:
    """Return the objective; see ``ObjectiveInfo.bind``.

    Raises:
        OrthoMergeError: With everything that is wrong with the settings.
    """
    from orthomerge.unlearning.objectives.bound import Objective

    kept = info.retain if retain is None else retain
    gamma = info.forget_weight if forget_weight is None else forget_weight
    without = 0.0 if kept == "none" and not info.dual else info.retain_weight
    alpha = without if retain_weight is None else retain_weight
    values, problems = _checked(info, parameters)
    problems += _weights(info, {"forget_weight": gamma, "retain_weight": alpha})
    problems += _retain(info, kept, alpha)
    if problems:
        raise combined(problems)
    return Objective(info, values, compat=compat, retain=kept, weights=(gamma, alpha))


def _checked(
    info: ObjectiveInfo, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[OrthoMergeError]]:
    """Return all parameters, defaults filled in, and what is wrong with those given."""
    problems: list[OrthoMergeError] = [
        UnknownNameError(f"parameter of {info.name}", name, info.parameters)
        for name in given
        if name not in info.parameters
    ]
    values = {}
    for name, parameter in info.parameters.items():
        try:
            values[name] = parameter.check(given.get(name, parameter.default))
        except RecipeError as error:
            problems.append(error)
    for name in info.required:
        if values.get(name, True) is None:
            problem = f"{info.name} needs its parameter '{name}'"
            problems.append(RecipeError(problem, remedy=info.parameters[name].help))
    return values, problems


def _weights(info: ObjectiveInfo, weights: Mapping[str, Any]) -> list[OrthoMergeError]:
    return [
        RecipeError(f"{name} of {info.name}", expected="a number ≥ 0", found=repr(weight))
        for name, weight in weights.items()
        if isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not (math.isfinite(weight) and weight >= 0)
    ]


def _retain(info: ObjectiveInfo, retain: str, weight: Any) -> list[OrthoMergeError]:
    legal = [name for name in RETAIN_LOSSES if name != "hidden" or "hidden" in info.arguments]
    if retain not in RETAIN_LOSSES:
        return [UnknownNameError("retain loss", retain, legal)]
    if retain not in legal:
        problem = f"{info.name} has no layer to compare hidden states at"
        return [RecipeError(problem, expected=" | ".join(legal), found=retain)]
    if retain == "none" and (info.dual or weight):
        problem = f"{info.name} weighs the retain loss, and there is none"
        return [RecipeError(problem, remedy="Name a retain loss, or set retain_weight to 0.")]
    return []
