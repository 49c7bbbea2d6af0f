"""Forgetting without training: a merge that takes away what an expert learned of the forget set.

A LoRA or full expert is subtracted as a task vector, ``W - s (W_expert - W)``; an OFT adapter is
turned back, ``W R^{-s}``.
"""

from __future__ import annotations

from orthomerge.adapters.sources import open_source
from orthomerge.errors import RecipeError
from orthomerge.recipe.schema import MergeRecipe, ModelEntry, OutputSettings
from orthomerge.recipe.unlearning_schema import UnlearnRecipe

__all__ = ["negation_merge"]

_ROTATIONS = ("OFT", "BOFT", "HRA")


def negation_merge(recipe: UnlearnRecipe) -> MergeRecipe:
    """Return the merge that carries out a recipe's negation.

    Args:
        recipe: With ``negation``; what concerns training is not looked at.

    Raises:
        RecipeError: The recipe has no negation.
        CheckpointError: The expert cannot be opened.

    References:
        Task arithmetic: arXiv:2212.04089.
    """
    if recipe.negation is None:
        raise RecipeError("the recipe has no negation", remedy="Give negation.expert.")
    expert = open_source(recipe.negation.expert)
    rotation = expert.kind in _ROTATIONS
    strength = recipe.negation.strength
    return MergeRecipe(
        models=[ModelEntry(path=recipe.negation.expert, weight=None if rotation else -strength)],
        base=recipe.model,
        method="orthomerge" if rotation else "task-arithmetic",
        parameters={"strength": -strength} if rotation else {},
        output=OutputSettings(path=recipe.output, form="auto"),
        seed=recipe.seed,
    )
