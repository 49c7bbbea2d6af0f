"""Tell one kind of recipe from another, and read either; what is in them is known elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.recipe.loader import load_recipe, recipe_from_data
from orthomerge.recipe.yaml_positions import Document, load_yaml_file

if TYPE_CHECKING:
    from orthomerge.recipe.schema import MergeRecipe
    from orthomerge.recipe.unlearning_schema import UnlearnRecipe

__all__ = ["any_recipe_from_data", "is_unlearning", "load_any_recipe"]


def is_unlearning(data: Any) -> bool:
    """Return whether a recipe's data names the one model of an unlearning run.

    >>> is_unlearning({"model": "tuned"}), is_unlearning({"models": ["a", "b"]})
    (True, False)
    """
    return isinstance(data, Mapping) and "model" in data and "models" not in data


def load_any_recipe(path: Path, settings: Sequence[str] = ()) -> MergeRecipe | UnlearnRecipe:
    """Read, override and check a recipe file of whichever kind it is.

    Raises:
        RecipeError: One thing is wrong.
        ProblemsError: Several things are wrong.
    """
    document = load_yaml_file(path)
    if not isinstance(document.data, dict):
        return load_recipe(path, settings)
    return any_recipe_from_data(document, settings)


def any_recipe_from_data(
    document: Document, settings: Sequence[str] = ()
) -> MergeRecipe | UnlearnRecipe:
    """Check plain data as a recipe of whichever kind it is."""
    if not is_unlearning(document.data):
        return recipe_from_data(document, settings)
    from orthomerge.recipe.unlearning import unlearning_from_data

    return unlearning_from_data(document, settings)
