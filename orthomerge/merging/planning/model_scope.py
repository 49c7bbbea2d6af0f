"""Check methods that look at the whole model first: one setting for all, and where they may run.

``scope: model`` is looked for in the method's own parameters and in those of nested methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orthomerge.checkpoints.dtypes import ITEM_SIZES
from orthomerge.errors import RecipeError
from orthomerge.merging.lora.frames import coordinate_shape, lift_of
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.lora.strengths import update_strength
from orthomerge.merging.nesting import nested_choices, surveyed_choice
from orthomerge.merging.plan import MERGED_KINDS, MergeRequest, Task
from orthomerge.merging.planning.draft import Draft
from orthomerge.merging.planning.memory import SURVEY_SHARE
from orthomerge.merging.registry import MergeMethod

__all__ = ["check_factored", "check_model_survey"]


def check_model_survey(request: MergeRequest, method: MergeMethod, draft: Draft) -> None:
    """Report settings that a survey of the whole model cannot have; note the memory it takes.

    It runs once, so its parameters cannot vary within the model; and it sees every model in every
    module, so no adapter can be left out of one.

    Args:
        request: What was asked.
        method: The method.
        draft: The plan in the making, with all its tasks.
    """
    merged = [t for t in draft.tasks if t.kind in MERGED_KINDS and t.method is None]
    surveyed = [surveyed_choice(method, task.parameters) for task in merged]
    parameters = [{"method": chosen.name, **given} for chosen, given in surveyed]
    if not any(p.get("scope") == "model" for p in parameters):
        return
    entries = sum(draft.surveyed_entries.get(task.name, task.info.numel) for task in merged)
    draft.survey_bytes = int(SURVEY_SHARE * entries) * ITEM_SIZES[draft.compute_dtype]
    for key in parameters[0]:
        if len({str(p.get(key)) for p in parameters}) > 1:
            draft.problems.append(
                RecipeError(
                    f"with scope: model the parameter '{key}' must have one value for all tensors",
                    remedy="Give it one value, or use scope: tensor.",
                )
            )
    absent = [t.name for t in merged if t.kind == "factors" and None in t.models]
    if absent and request.absent == "skip":
        draft.problems.append(
            RecipeError(
                "with scope: model no adapter can be left out of a module",
                tensor=absent[0],
                remedy="Pass --absent zero, or use scope: tensor.",
            )
        )


def check_factored(method: MergeMethod, task: Task, module: JoinedLora, draft: Draft) -> None:
    """Report why a method cannot merge one module's factors; note what a survey sees of it.

    Args:
        method: The method.
        task: The module's task.
        module: What it merges.
        draft: The plan in the making.
    """
    nested = _nested_problem(method, task.parameters)
    if nested:
        draft.report_once(nested)
    for each, given in [
        (method, task.parameters),
        *nested_choices(method, task.parameters, deep=True),
    ]:
        if each.unfit and (problem := each.unfit((module.rows, module.columns), "linear", given)):
            draft.report_once(RecipeError(problem, tensor=module.name))
        if each.whole_changes and module.dora:
            draft.report_once(
                RecipeError(
                    f"{each.name} sees only the low-rank part of a DoRA adapter's change, and "
                    "would leave its magnitudes as loud as they are",
                    tensor=module.name,
                    remedy="Lower that adapter's --weight, which counts for its magnitudes, too.",
                )
            )
    if (module.dora or module.biased) and not _known_strength(method, task):
        draft.report_once(
            RecipeError(
                "magnitudes and biases need the nested method's scale before it runs",
                tensor=module.name,
                remedy="Give the nested method a number for its scale.",
            )
        )
    unfit = method.unfit_ranks(module.ranks) if method.unfit_ranks else None
    if unfit:
        remedy = "Use a method that takes any ranks: task-arithmetic."
        draft.report_once(RecipeError(unfit, tensor=module.name, remedy=remedy))
    draft.surveyed_entries[task.name] = math.prod(
        coordinate_shape(
            module.rows, module.columns, sum(module.ranks), lift_of(method, task.parameters)
        )
    )


def _known_strength(method: MergeMethod, task: Task) -> bool:
    """Return whether magnitudes and biases can follow; the outer method measures its own scale."""
    weights = [1.0] * len(task.models)
    return update_strength(method, task.parameters, weights, measured=1.0) is not None


def _nested_problem(method: MergeMethod, parameters: Mapping[str, Any]) -> RecipeError | None:
    """Return why a method of low-rank factors cannot run a nested one, or None."""
    for chosen, _ in nested_choices(method, parameters):
        if method.lift is not None and "additive" not in chosen.laws:
            return RecipeError(
                f"{chosen.name} needs the base's weights, so {method.name} cannot run it",
                remedy="Use a method whose update does not depend on the base: ties.",
            )
        inner = nested_choices(method, parameters, deep=True)
        if method.lift is None and any(given.get("scope") == "model" for _, given in inner):
            return RecipeError(
                f"scope: model looks at the whole model before {method.name} has changed it",
                remedy="Use scope: tensor, or run the nested method itself, or in knots or core.",
            )
    return None
