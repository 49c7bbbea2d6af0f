"""Values that vary from tensor to tensor: globs, first match wins, and gradients over the layers.

A value is a scalar; a list of numbers, interpolated from the first to the last layer; or a list of
``{match: glob, value: ...}`` rules whose last may leave out ``match``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orthomerge.errors import OrthoMergeError, RecipeError

__all__ = ["LayerMap", "check_value", "unmatched_rules", "value_for"]

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_FIRST = ("embed", "wte", "wpe", "shared.weight")


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Where in the depth of a model each tensor lies, from 0 (input) to 1 (output).

    The layer is the first number in a tensor's name. Tensors without one lie at 0 if they are
    input embeddings and at 1 otherwise (final norm, head).
    """

    positions: Mapping[str, float]

    @classmethod
    def of(cls, names: Iterable[str]) -> LayerMap:
        """Derive the positions from tensor names."""
        layers = {name: match for name in names for match in [_LAYER.search(name)]}
        stacks: dict[str, int] = {}
        for name, match in layers.items():
            if match:
                stack = name[: match.start(1)]
                stacks[stack] = max(stacks.get(stack, 0), int(match[1]))
        positions = {}
        for name, match in layers.items():
            if match:
                depth = stacks[name[: match.start(1)]]
                positions[name] = int(match[1]) / depth if depth else 0.0
            else:
                positions[name] = 0.0 if any(part in name for part in _FIRST) else 1.0
        return cls(positions)


def check_value(value: Any, check: Callable[[Any], Any], where: str) -> list[OrthoMergeError]:
    """Return what is wrong with a value, checking every scalar in it with ``check``."""
    problems: list[OrthoMergeError] = []
    if isinstance(value, Mapping) and "method" not in value:  # which a nested method has
        return [
            RecipeError(
                f"{where} must be a scalar, a gradient or a list of rules, "
                "or name a method with the key method where it takes one",
                found=value,
            )
        ]
    if isinstance(value, list) and not value:
        return [RecipeError(f"{where} is an empty list")]
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        for position, rule in enumerate(value):
            problems += _check_rule(rule, position == len(value) - 1, check, where)
        return problems
    if isinstance(value, list) and not all(map(_is_number, value)):
        return [RecipeError(f"{where} can only be a gradient of numbers; use rules", found=value)]
    for item in value if isinstance(value, list) else [value]:
        try:
            check(item)
        except RecipeError as error:
            problems.append(error)
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rule(
    rule: Mapping[str, Any], last: bool, check: Callable[[Any], Any], where: str
) -> list[OrthoMergeError]:
    keys = set(rule)
    if not (keys == {"match", "value"} or (last and keys == {"value"})):
        return [
            RecipeError(
                f"a rule of {where} needs the keys match and value (the last may omit match)",
                found=sorted(keys),
            )
        ]
    if not isinstance(rule.get("match", ""), str):
        return [RecipeError(f"match in a rule of {where} must be a glob", found=rule["match"])]
    if isinstance(rule["value"], list) and any(isinstance(v, Mapping) for v in rule["value"]):
        return [RecipeError(f"a rule of {where} must hold a scalar or a gradient, not rules")]
    return check_value(rule["value"], check, where)


def value_for(value: Any, name: str, layers: LayerMap, default: Any) -> Any:
    """Return the value that applies to the tensor ``name``.

    Args:
        value: Scalar, gradient or rules, already checked.
        name: The tensor.
        layers: Positions of all tensors.
        default: What applies when no rule matches.
    """
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        for rule in value:
            if fnmatch.fnmatchcase(name, rule.get("match", "*")):
                return value_for(rule["value"], name, layers, default)
        return default
    if isinstance(value, list):
        return _interpolate(value, layers.positions[name])
    return value


def _interpolate(points: Sequence[float], position: float) -> float:
    scaled = position * (len(points) - 1)
    left = min(int(scaled), len(points) - 2) if len(points) > 1 else 0
    right = min(left + 1, len(points) - 1)
    return points[left] + (points[right] - points[left]) * (scaled - left)


def unmatched_rules(value: Any, names: Iterable[str]) -> list[str]:
    """Return the globs in ``value`` that match no tensor: most likely typing errors."""
    if not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
        return []
    known = list(names)
    globs = [rule["match"] for rule in value if "match" in rule]
    return [glob for glob in globs if not fnmatch.filter(known, glob)]
