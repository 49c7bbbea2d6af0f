"""From YAML text, ``--set`` and keywords to a run of unlearning; the door ``unlearn``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.errors import (
    OrthoMergeError,
    ProblemsError,
    RecipeError,
    UnknownNameError,
    combined,
)
from orthomerge.recipe.unlearning_projection import projection_settings
from orthomerge.recipe.unlearning_schema import ObjectiveOptions, UnlearnRecipe
from orthomerge.recipe.validation import apply_settings, validated
from orthomerge.recipe.yaml_positions import Document, load_recipe_file
from orthomerge.unlearning.objectives import get_objective

if TYPE_CHECKING:
    from orthomerge.unlearning.objectives import Objective
    from orthomerge.unlearning.training import StepReport, UnlearnRequest, UnlearnResult

__all__ = ["load_unlearning", "unlearn", "unlearning_from_data", "unlearning_request"]

_LOSS_KEYS = frozenset(ObjectiveOptions.model_fields)


def load_unlearning(path: Path, settings: Sequence[str] = ()) -> UnlearnRecipe:
    """Read, override and check a recipe file.

    Raises:
        RecipeError: One thing is wrong.
        ProblemsError: Several things are wrong.
    """
    keys, remedy = "keys model and forget", "Start from one of recipes/unlearning."
    return unlearning_from_data(load_recipe_file(path, keys=keys, remedy=remedy), settings)


def unlearning_from_data(document: Document, settings: Sequence[str] = ()) -> UnlearnRecipe:
    """Check plain data as a recipe, after applying ``key=value`` overrides.

    In an override a key of ``loss`` may stand alone (``retain_weight=10``), and a key that is none
    of the recipe's is a parameter of the objective.
    """
    given = [f"loss.{s}" if s.partition("=")[0] in _LOSS_KEYS else s for s in settings]
    data = apply_settings(document.data, given, UnlearnRecipe)
    recipe = validated(UnlearnRecipe, data, document)
    problems = [*_missing(recipe, document), *_unknown(recipe, document)]
    if problems:
        raise combined(problems)
    return recipe


def unlearning_request(recipe: UnlearnRecipe) -> UnlearnRequest:
    """Translate a recipe into the run's own terms.

    Raises:
        RecipeError: The objective or the projection refuses its parameters.
    """
    from orthomerge.unlearning.training import (
        AdapterSettings,
        DataSettings,
        StopSettings,
        TrainSettings,
        UnlearnRequest,
    )

    assert recipe.forget is not None
    assert recipe.output is not None
    adapter, train = recipe.adapter.model_dump(), recipe.train.model_dump()
    if isinstance(adapter["targets"], list):
        adapter["targets"] = tuple(adapter["targets"])
    projection, bank_rows = _projection(recipe)
    return UnlearnRequest(
        model=recipe.model,
        forget=recipe.forget,
        retain=recipe.retain,
        holdout=recipe.holdout,
        objective=_objective(recipe),
        projection=projection,
        bank_rows=bank_rows,
        adapter=AdapterSettings(**adapter),
        data=DataSettings(**recipe.data.model_dump()),
        train=TrainSettings(**train, seed=recipe.seed),
        stop=StopSettings(**recipe.stop.model_dump()),
        output=Path(recipe.output),
        record=recipe.record(),
    )


def unlearn(
    model: str | Path,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[StepReport], None] | None = None,
    **options: Any,
) -> UnlearnResult:
    """Make a model forget a set of rows and keep the rest; the same as ``orthomerge unlearn``.

    Args:
        model: Folder of the model.
        forget: What shall be forgotten: a file or folder of rows.
        retain: What shall be kept.
        output: Folder to make: an adapter, or a model with ``adapter={"kind": "full"}``.
        resume: Continue an interrupted run.
        overwrite: Replace an existing output.
        report: Is told of every step.
        **options: Other keys of a recipe, e.g. ``holdout``, ``objective``, ``projection``,
            ``train={"max_steps": 50}``; any other key is a parameter of the objective.

    Returns:
        What was done, with the table of losses before and after.

    Raises:
        OrthoMergeError: See ``orthomerge.errors``; nothing of the output is there then.
    """
    given = {"model": model, "forget": forget, "retain": retain, "output": output}
    data: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key, value in options.items():
        if key in UnlearnRecipe.model_fields:
            data[key] = value
        elif key in _LOSS_KEYS:
            data["loss"] = {**data.get("loss", {}), key: value}
        else:
            data.setdefault("parameters", {})[key] = value
    recipe = unlearning_from_data(Document(data, "call of unlearn"))
    if recipe.negation is not None:
        raise RecipeError(
            "negation is a merge, not a training run",
            remedy="Call orthomerge.merge([expert], base=model, method='task-arithmetic', "
            "weights=[-strength], output=...) instead, or the command orthomerge unlearn.",
        )
    from orthomerge.unlearning.training import run_unlearning

    request = unlearning_request(recipe)
    return run_unlearning(request, resume=resume, overwrite=overwrite, report=report)


def _missing(recipe: UnlearnRecipe, document: Document) -> list[OrthoMergeError]:
    if recipe.output is None:
        return [RecipeError("the key 'output' is missing", file=document.name)]
    if recipe.forget is None and recipe.negation is None:
        return [RecipeError("the key 'forget' is missing", file=document.name)]
    return []


def _unknown(recipe: UnlearnRecipe, document: Document) -> list[OrthoMergeError]:
    """Return what the objective and the projection say is wrong, with where it stands."""
    problems: list[OrthoMergeError] = []
    objective: Objective | None = None
    try:
        objective = _objective(recipe)
    except OrthoMergeError as error:
        problems.append(error.at(document.where(_place(error, recipe))))

    def where(key: str | None) -> str:
        return document.where(("projection", key) if key else ("projection",))

    try:
        projection, _ = _projection(recipe, where)
    except OrthoMergeError as error:
        return [*problems, *(error.problems if isinstance(error, ProblemsError) else (error,))]
    if projection is not None and objective is not None and objective.retain == "none":
        problems.append(
            RecipeError(
                "the projection protects the retain loss, and there is none",
                file=document.where(("loss", "retain_loss")),
                remedy="Choose another loss.retain_loss, or set projection to off.",
            )
        )
    return problems


def _place(error: OrthoMergeError, recipe: UnlearnRecipe) -> tuple[str, ...]:
    """Return the key of the recipe that an objective's complaint is about."""
    if isinstance(error, UnknownNameError):
        return ("objective",) if error.kind == "objective" else ("parameters", error.name)
    if recipe.loss.retain_loss is not None and error.found == recipe.loss.retain_loss:
        return ("loss", "retain_loss")
    return ("parameters",) if recipe.parameters else ("objective",)


def _objective(recipe: UnlearnRecipe) -> Objective:
    return get_objective(recipe.objective).bind(
        compat=recipe.loss.compat,
        retain=recipe.loss.retain_loss,
        forget_weight=recipe.loss.forget_weight,
        retain_weight=recipe.loss.retain_weight,
        **recipe.parameters,
    )


def _projection(
    recipe: UnlearnRecipe, where: Callable[[str | None], str] | None = None
) -> tuple[Mapping[str, Any] | None, int]:
    momentum = recipe.train.optimizer == "adamw"
    return projection_settings(recipe.projection, momentum=momentum, where=where)
