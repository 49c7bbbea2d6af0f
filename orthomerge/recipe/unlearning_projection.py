"""The projection of an unlearning recipe: from plain values to the projector's settings.

What needs more than a recipe can give (rows of a loop of one's own, a Fisher diagonal) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from orthomerge.errors import (
    OrthoMergeError,
    ProblemsError,
    RecipeError,
    UnknownNameError,
    combined,
)

__all__ = ["projection_settings"]

_BANK_ROWS = 256
_DTYPES = Literal["float64", "float32", "bfloat16", "float16"]

Where = Callable[[str | None], str]


def projection_settings(
    given: Mapping[str, Any], *, momentum: bool, where: Where | None = None
) -> tuple[dict[str, Any] | None, int]:
    """Return the projector's settings, None for none, and how many rows its bank covers.

    Args:
        given: The preset, and settings on top.
        momentum: Whether the optimizer has it.
        where: Gives the place of a setting in the recipe, and of the projection for None.

    Raises:
        RecipeError: One thing is wrong.
        ProblemsError: Several things are.
    """
    changes = dict(given)
    name = changes.pop("preset")
    problems = [] if name == "off" else _problems(str(name), changes, momentum)
    if problems:
        placed = [error.at(where(key)) if where else error for key, error in problems]
        raise combined(placed)
    if name == "off":
        return None, 0
    bank_rows = changes.pop("bank_rows", _BANK_ROWS)
    return _settings(str(name), changes), bank_rows


def _settings(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from orthomerge.unlearning.projection import preset

    found = preset(
        name, **{key: _types()[key].validate_python(v, strict=True) for key, v in changes.items()}
    )
    if isinstance(found.get("row_dtype"), str):
        found["row_dtype"] = getattr(torch, found["row_dtype"])
    return found


def _types() -> dict[str, TypeAdapter[Any]]:
    """Return the type of every setting as a recipe writes it."""
    from orthomerge.unlearning.projection import ProjectionSettings

    hints = get_type_hints(ProjectionSettings)
    types: dict[str, Any] = {field.name: hints[field.name] for field in fields(ProjectionSettings)}
    types |= {"row_dtype": _DTYPES, "scope": str | None, "bank_rows": int}
    return {key: TypeAdapter(kind) for key, kind in types.items()}


def _problems(
    name: str, changes: Mapping[str, Any], momentum: bool
) -> list[tuple[str | None, OrthoMergeError]]:
    """Return what is wrong, each with the setting it is about."""
    from orthomerge.unlearning.projection import PRESETS, ProjectionSettings

    if name not in PRESETS:
        return [("preset", UnknownNameError("preset", name, PRESETS))]
    problems = list(_of_single_values(changes))
    if problems:
        return problems
    settings = _settings(name, {k: v for k, v in changes.items() if k != "bank_rows"})
    settings.pop("scope", None)
    try:
        found = ProjectionSettings(**settings)
    except OrthoMergeError as error:
        parts = error.problems if isinstance(error, ProblemsError) else (error,)
        return [(_subject(part, changes), part) for part in parts]
    return [(None, error) for error in _beyond_recipes(found, momentum)]


def _of_single_values(
    changes: Mapping[str, Any],
) -> Iterator[tuple[str | None, OrthoMergeError]]:
    types = _types()
    for key, value in changes.items():
        if key not in types:
            yield key, UnknownNameError("setting of the projection", key, types)
            continue
        try:
            types[key].validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            yield key, RecipeError(f"projection.{key}: {message}", found=repr(value))
            continue
        if key == "bank_rows" and value < 1:
            yield (
                key,
                RecipeError("projection.bank_rows is too small", expected=">= 1", found=value),
            )
        if key == "scope" and value is not None:
            try:
                re.compile(value)
            except re.error as error:
                problem = f"projection.scope is not a regular expression: {error}"
                yield key, RecipeError(problem, found=value)


def _subject(error: OrthoMergeError, changes: Mapping[str, Any]) -> str | None:
    """Return the setting that an error of ``ProjectionSettings`` is about, if it can be told."""
    words = error.kind if isinstance(error, UnknownNameError) else error.problem
    return next((key for key in changes if words.startswith(key)), None)


def _beyond_recipes(settings: Any, momentum: bool) -> Iterator[OrthoMergeError]:
    if "fisher" in (settings.metric, settings.delta_metric):
        yield RecipeError(
            "the metric 'fisher' needs a diagonal, which a recipe cannot give",
            remedy="Use euclid or adam; in Python: RetainProjector(..., fisher=...).",
        )
    if not {"batch", "bank"} & set(settings.rows):
        yield RecipeError(
            "these rows are given by a training loop of one's own",
            expected="batch or bank among the rows",
            found=tuple(settings.rows),
            remedy="In Python: RetainProjector.add_rows.",
        )
    if momentum and not settings.after_step and not settings.allow_approximate:
        yield RecipeError(
            "stage A alone does not hold with an optimizer that has momentum",
            remedy="Set stage to AB, train.optimizer to sgd, or allow_approximate to true.",
        )
