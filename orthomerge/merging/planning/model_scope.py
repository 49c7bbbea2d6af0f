"""Check methods that look at the whole model first: one setting for all, and where they may run.

``scope: model`` is looked for in the method's own parameters and in those of nested methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orthomerge.checkpoints.dtypes import ITEM_SIZES
from orthomerge.errors import RecipeError
from orthomerge.merging.frames import coordinate_entries, lift_of
from orthomerge.merging.lora_modules import JoinedLora
from orthomerge.merging.plan import MERGED_KINDS, MergeRequest, Task
from orthomerge.merging.planning.draft import Draft
from orthomerge.merging.planning.memory import SURVEY_SHARE
from orthomerge.merging.registry import MergeMethod, get_method

__all__ = ["check_factors_survey", "check_model_survey", "nested_problem"]


def check_model_survey(draft: Draft, entries: Mapping[str, int] | None = None) -> None:
    """Report settings that a survey of the whole model cannot have; note the memory it takes.

    It runs once, so its parameters cannot vary within the model.

    Args:
        draft: The plan in the making, with all its tasks.
        entries: Task name to how many entries one model contributes; default: its output's.
    """
    merged = _merged(draft)
    parameters = [_surveyed(task.parameters) for task in merged]
    if not any(p.get("scope") == "model" for p in parameters):
        return
    total = sum(entries[task.name] if entries else task.info.numel for task in merged)
    draft.survey_bytes = int(SURVEY_SHARE * total) * ITEM_SIZES[draft.compute_dtype]
    for key in parameters[0]:
        if len({str(p.get(key)) for p in parameters}) > 1:
            draft.problems.append(
                RecipeError(
                    f"with scope: model the parameter '{key}' must have one value for all tensors",
                    remedy="Give it one value, or use scope: tensor.",
                )
            )


def check_factors_survey(
    request: MergeRequest, method: MergeMethod, modules: Sequence[JoinedLora], draft: Draft
) -> None:
    """Do the same for a merge of low-rank factors, whose survey sees the models' coordinates.

    Args:
        request: What was asked.
        method: The method.
        modules: What the merged tasks of the draft merge, in their order.
        draft: The plan in the making, with all its tasks.
    """
    merged = _merged(draft)
    entries = {}
    for task, module in zip(merged, modules, strict=True):
        rank, space = sum(module.ranks), lift_of(method, task.parameters)
        entries[task.name] = coordinate_entries(module.rows, module.columns, rank, space)
    check_model_survey(draft, entries)
    whole_model = any(_surveyed(task.parameters).get("scope") == "model" for task in merged)
    absent = [module.name for module in modules if None in module.parts]
    if whole_model and absent and request.absent == "skip":
        draft.problems.append(
            RecipeError(
                "with scope: model no adapter can be left out of a module",
                tensor=absent[0],
                remedy="Pass --absent zero, or use scope: tensor.",
            )
        )


def nested_problem(method: MergeMethod, parameters: Mapping[str, Any]) -> RecipeError | None:
    """Return why a method of low-rank factors cannot run a nested one, or None."""
    for inner in _nested(parameters):
        chosen = get_method(inner["method"])
        if method.lift is not None and "additive" not in chosen.laws:
            return RecipeError(
                f"{chosen.name} needs the base's weights, so {method.name} cannot run it",
                remedy="Use a method whose update does not depend on the base: ties.",
            )
        hidden = _deep(inner) if method.lift is not None else _deep(parameters)
        if any(choice.get("scope") == "model" for choice in hidden):
            return RecipeError(
                f"scope: model looks at the whole model before {method.name} has changed it",
                remedy="Use scope: tensor, or run the method itself, in knots or in core.",
            )
    return None


def _merged(draft: Draft) -> list[Task]:
    """Return the tasks of the plan's own method."""
    return [task for task in draft.tasks if task.kind in MERGED_KINDS and task.method is None]


def _surveyed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters a survey is made with: the nested method's, or all."""
    return next(_nested(parameters), parameters)


def _nested(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from (value for value in parameters.values() if isinstance(value, Mapping))


def _deep(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the choices in the parameters and the choices in those."""
    for inner in _nested(parameters):
        yield inner
        yield from _deep(inner)
