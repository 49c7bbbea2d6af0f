"""From YAML text and ``--set`` options to a checked recipe; every error with its line and column.

Nothing here opens a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from orthomerge.errors import (
    OrthoMergeError,
    RecipeError,
    UnknownNameError,
    combined,
)
from orthomerge.merging.planning.checks import check_parameters
from orthomerge.merging.registry import MergeMethod, get_method
from orthomerge.recipe.schema import MergeRecipe
from orthomerge.recipe.yaml_positions import Document, load_yaml_file, parse_value

__all__ = ["apply_settings", "check_recipe", "load_recipe", "recipe_from_data"]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> MergeRecipe:
    """Read, override and check a recipe file.

    Args:
        path: A YAML file.
        settings: ``key=value`` overrides, see ``apply_settings``.

    Raises:
        RecipeError: One thing is wrong.
        ProblemsError: Several things are wrong.
    """
    document = load_yaml_file(path)
    if not isinstance(document.data, dict):
        raise RecipeError(
            "a recipe is a mapping with at least the key models",
            file=path,
            remedy="Start from one with: orthomerge init ties",
        )
    return recipe_from_data(document, settings)


def recipe_from_data(document: Document, settings: Sequence[str] = ()) -> MergeRecipe:
    """Check plain data as a recipe, after applying ``key=value`` overrides."""
    data = apply_settings(document.data, settings)
    try:
        recipe = MergeRecipe.model_validate(data)
    except ValidationError as error:
        problems = [_problem(item, document) for item in error.errors()]
        raise combined(problems) from None
    problems = check_recipe(recipe, document)
    if problems:
        raise combined(problems)
    return recipe


def check_recipe(recipe: MergeRecipe, document: Document) -> list[OrthoMergeError]:
    """Return what the method's registration says is wrong with the recipe."""
    if recipe.method is None:
        return []
    try:
        method = get_method(recipe.method)
    except UnknownNameError as error:
        return [error.at(document.where(("method",)))]
    problems = _parameter_problems(method, recipe, document)
    if problems and method.dense:  # the sources may decide for its other form
        problems = _parameter_problems(get_method(method.dense), recipe, document) and problems
    for position, entry in enumerate(recipe.models):
        if entry.weight is not None:
            for problem in check_parameters(method, {}, (entry.weight,)):
                problems.append(problem.at(document.where(("models", position, "weight"))))
    return problems


def _parameter_problems(
    method: MergeMethod, recipe: MergeRecipe, document: Document
) -> list[OrthoMergeError]:
    problems = []
    for name, value in recipe.parameters.items():
        for path, part in _parts(name, value):
            found = check_parameters(method, {name: part}, None)
            problems += [problem.at(document.where(("parameters", *path))) for problem in found]
            if found and path[1:] == ("method",):
                break  # what it takes is not known
    return problems


def _parts(name: str, value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Split a nested method into its name and each of its parameters; with where each stands."""
    if not isinstance(value, Mapping) or "method" not in value:
        return [((name,), value)]
    method = {"method": value["method"]}
    parts = [((name, key), {**method, key: item}) for key, item in value.items() if key != "method"]
    return [((name, "method"), method), *parts]


def apply_settings(data: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return recipe data with ``key=value`` overrides applied.

    A key that starts with a key of the recipe is a dotted path into it (``output.dtype=float32``,
    ``models.0.weight=0.3``); any other key is a method parameter (``density=0.3``), or a dotted
    path into one that names another method (``residual.density=0.3``). The value is read as YAML.

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
        if parts[0] not in MergeRecipe.model_fields:
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


def _problem(item: Any, document: Document) -> OrthoMergeError:
    """Turn one pydantic error into ours, with the position and a suggestion."""
    path = tuple(item["loc"])
    where = document.where(path)
    dotted = ".".join(map(str, path))
    if item["type"] == "extra_forbidden":
        return UnknownNameError("key", str(path[-1]), _known_keys(path[:-1]), file=where)
    if item["type"] == "missing":
        return RecipeError(f"the key '{dotted}' is missing", file=where)
    message = item["msg"].removeprefix("Value error, ")
    return RecipeError(f"{dotted}: {message}", file=where, found=repr(item["input"]))


def _known_keys(path: Sequence[str | int]) -> list[str]:
    """Return the keys that are allowed at a place of the recipe."""
    model: type[BaseModel] = MergeRecipe
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
