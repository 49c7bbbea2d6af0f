"""From YAML text and ``--set`` options to a checked merge; every error with its line and column.

Nothing here opens a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthoMergeError, UnknownNameError, combined
from orthomerge.merging.planning.checks import check_parameters
from orthomerge.merging.registry import MergeMethod, get_method
from orthomerge.recipe.schema import MergeRecipe
from orthomerge.recipe.validation import apply_settings, validated
from orthomerge.recipe.yaml_positions import Document, load_recipe_file

__all__ = ["check_recipe", "load_recipe", "recipe_from_data"]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> MergeRecipe:
    """Read, override and check a recipe file.

    Args:
        path: A YAML file.
        settings: ``key=value`` overrides, see ``apply_settings``.

    Raises:
        RecipeError: One thing is wrong.
        ProblemsError: Several things are wrong.
    """
    remedy = "Start from one with: orthomerge init ties"
    return recipe_from_data(load_recipe_file(path, keys="key models", remedy=remedy), settings)


def recipe_from_data(document: Document, settings: Sequence[str] = ()) -> MergeRecipe:
    """Check plain data as a recipe, after applying ``key=value`` overrides."""
    data = apply_settings(document.data, settings, MergeRecipe)
    recipe = validated(MergeRecipe, data, document)
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
