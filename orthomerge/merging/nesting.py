"""A method inside a method: the value of a parameter that names another method.

Checks the name and its parameters and fills in the defaults; running it is the outer method's part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orthomerge.errors import RecipeError, UnknownNameError
from orthomerge.merging.parameters import NestedParameter
from orthomerge.merging.registry import MergeMethod, all_methods, get_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.draws import Draws

__all__ = [
    "nested_choices",
    "nested_method",
    "run_nested",
    "surveyed_choice",
    "unfit_nested",
]


def nested_method(
    parameter: str, value: Mapping[str, Any] | str, space: Space = Space.DELTA
) -> dict[str, Any]:
    """Return ``{"method": name, parameter: value, ...}`` with every parameter filled in.

    Args:
        parameter: The outer method's parameter, for messages.
        value: What was given for it; a name alone stands for that method's defaults.
        space: What the outer method hands on: changes of weights, or low-rank factors.

    Raises:
        UnknownNameError: No such method, or no such parameter of it.
        RecipeError: The method does not merge task vectors, or a value is out of range.
    """
    if isinstance(value, str):
        value = {"method": value}
    method = get_method(value["method"])
    if not _fits(method, space):
        legal = [name for name, known in all_methods().items() if _fits(known, space)]
        what = "task vectors" if space is Space.DELTA else "low-rank factors"
        raise RecipeError(
            f"parameter '{parameter}' needs a method that merges {what}",
            expected=" | ".join(legal),
            found=method.name,
        )
    given = {key: item for key, item in value.items() if key != "method"}
    for key in given:
        if key not in method.parameters:
            raise UnknownNameError(f"parameter of {method.name}", key, method.parameters)
    filled = {key: p.check(given.get(key, p.default)) for key, p in method.parameters.items()}
    return {"method": method.name, **filled}


def nested_choices(
    method: MergeMethod, parameters: Mapping[str, Any], *, deep: bool = False
) -> list[tuple[MergeMethod, dict[str, Any]]]:
    """Return the methods that a method's parameters name, each with all of its own.

    Args:
        method: The outer method.
        parameters: Its parameters; null is its default, which may be none.
        deep: Return those nested in the nested ones, too.
    """
    found = []
    for name, parameter in method.parameters.items():
        given = parameters.get(name) or parameter.default
        if isinstance(parameter, NestedParameter) and given:
            choice = nested_method(name, given, parameter.nested_space)
            inner = get_method(choice.pop("method"))
            found.append((inner, choice))
            found += nested_choices(inner, choice, deep=True) if deep else []
    return found


def surveyed_choice(
    method: MergeMethod, parameters: Mapping[str, Any]
) -> tuple[MergeMethod, Mapping[str, Any]]:
    """Return whose survey of the whole model is meant: the nested method's, else the method's."""
    return next(iter(nested_choices(method, parameters)), (method, parameters))


def _fits(method: MergeMethod, space: Space) -> bool:
    if space is Space.FACTORS and method.factors is not None:
        return True
    task_vectors = method.space is Space.DELTA and not method.nests
    return task_vectors and (space is Space.DELTA or method.merges_factors)


def unfit_nested(choice: Mapping[str, Any] | None, shape: tuple[int, ...], role: str) -> str | None:
    """Return why the method that a nested parameter names cannot merge a tensor, or None."""
    method = get_method(choice["method"]) if choice else None
    if choice is None or method is None or method.unfit is None:
        return None
    return method.unfit(shape, role, {key: choice[key] for key in method.parameters})


def run_nested(
    choice: Mapping[str, Any],
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    role: str,
    survey: Any = None,
    draws: Draws | None = None,
) -> Tensor:
    """Merge whole tensors with the method a nested parameter names.

    Args:
        choice: From ``nested_method``.
        base: What the update is added to.
        deltas: One tensor per model, of the base's shape.
        weights: One per model.
        role: What the tensor is in the model.
        survey: The method's survey of the whole model; None to look at these tensors alone.
        draws: The outer method's random numbers, for a method that draws.
    """
    from orthomerge.merging.streams import HeldStream

    method = get_method(choice["method"])
    arguments = {key: item for key, item in choice.items() if key != "method"}
    if method.survey is not None and survey is None:
        streams = [HeldStream(delta) for delta in deltas]
        survey = method.survey(streams, weights=weights, **arguments)
    supplied = {"weights": weights, "survey": survey, "role": role}
    if draws is not None:
        supplied["draws"] = draws.by(method.name)
    merged: Tensor = method.call(base, deltas, **supplied, **arguments).tensor
    return merged
