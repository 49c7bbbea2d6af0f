"""What every kind of recipe shares: ``--set`` overrides, and errors that say where they are.

The grammars themselves are pydantic models elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from orthomerge.errors import OrthoMergeError, RecipeError, UnknownNameError, combined
from orthomerge.recipe.yaml_positions import Document, parse_value

__all__ = ["apply_settings", "validated"]

_Recipe = TypeVar("_Recipe", bound=BaseModel)


def validated(grammar: type[_Recipe], data: Mapping[str, Any], document: Document) -> _Recipe:
    """Check plain data against a grammar.

    Raises:
        RecipeError: One thing is wrong, with its line and column in the document.
        ProblemsError: Several things are wrong.
    """
    try:
        return grammar.model_validate(data)
    except ValidationError as error:
        problems = [_problem(item, document, grammar) for item in error.errors()]
        raise combined(problems) from None


def apply_settings(
    data: Mapping[str, Any], settings: Sequence[str], grammar: type[BaseModel]
) -> dict[str, Any]:
    """Return recipe data with ``key=value`` overrides applied.

    A key that starts with a key of the recipe is a dotted path into it (``output.dtype=float32``,
    ``models.0.weight=0.3``); any other key is a method parameter (``density=0.3``), or a dotted
    path into one that names another method (``residual.density=0.3``). The value is read as YAML.

    Args:
        data: The recipe.
        settings: The overrides.
        grammar: What kind of recipe it is.

    Raises:
        RecipeError: A setting has no ``=``, or its path leads nowhere.
    """
    result: dict[str, Any] = _copied(data)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"'{setting}' is not of the form key=value", remedy="See --help.")
        try:
            value = parse_value(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the value of '{setting}' is not valid YAML") from error
        parts = key.split(".")
        if parts[0] not in grammar.model_fields:
            parts = ["parameters", *parts]
        _assign(result, parts, value, setting)
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _assign(target: Any, parts: Sequence[str], value: Any, setting: str) -> None:
    *parents, last = parts
    root = target
    for part, following in zip(parents, parts[1:], strict=True):
        if isinstance(target, list):
            position = _position(target, part, setting)
            if isinstance(target[position], str):  # the short form of a model
                target[position] = {"path": target[position]}
            target = target[position]
        elif isinstance(target, dict):
            if isinstance(target.get(part), str) and target is not root:  # a method by its name
                target[part] = {"method": target[part]}
            target = target.setdefault(part, [] if following.isdigit() else {})
        else:
            raise RecipeError(f"'{setting}' leads into a value that has no parts")
    if isinstance(target, list):
        target[_position(target, last, setting)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RecipeError(f"'{setting}' leads into a value that has no parts")


def _position(items: list[Any], part: str, setting: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise RecipeError(f"'{setting}': there is no entry {part}", expected=f"0 to {len(items) - 1}")


def _problem(item: Any, document: Document, grammar: type[BaseModel]) -> OrthoMergeError:
    """Turn one pydantic error into ours, with the position and a suggestion."""
    path = tuple(item["loc"])
    where = document.where(path)
    dotted = ".".join(map(str, path))
    if item["type"] == "extra_forbidden":
        return UnknownNameError("key", str(path[-1]), _known_keys(path[:-1], grammar), file=where)
    if item["type"] == "missing":
        return RecipeError(f"the key '{dotted}' is missing", file=where)
    message = item["msg"].removeprefix("Value error, ")
    return RecipeError(f"{dotted}: {message}", file=where, found=repr(item["input"]))


def _known_keys(path: Sequence[str | int], grammar: type[BaseModel]) -> list[str]:
    """Return the keys that are allowed at a place of the recipe."""
    model = grammar
    for part in path:
        if isinstance(part, str):
            model = _nested(model, part) or model
    return list(model.model_fields)


def _nested(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(
        (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)),
        None,
    )
