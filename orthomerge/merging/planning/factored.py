"""Turn tasks of a full checkpoint into merges of low-rank factors, where adapters change a weight.

What adapters carry beside their factors, biases and trained heads, is added or averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orthomerge.adapters.lora import LoraModule
from orthomerge.adapters.lora_updates import LoraUpdate
from orthomerge.errors import RecipeError
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.lora.strengths import update_strength
from orthomerge.merging.plan import MergeRequest, Task
from orthomerge.merging.planning.carried import mean_weights
from orthomerge.merging.planning.draft import Draft, Settings, weight_sum_problem
from orthomerge.merging.planning.memory import base_bytes, factors_bytes
from orthomerge.merging.planning.model_scope import check_factored
from orthomerge.merging.planning.views import View
from orthomerge.merging.registry import MergeMethod

__all__ = ["factored_task", "joined_updates"]

_SUM = "task-arithmetic"


def factored_task(
    request: MergeRequest, task: Task, method: MergeMethod, views: Sequence[View], draft: Draft
) -> Task:
    """Return the task of one tensor for a method of low-rank factors.

    Args:
        request: What was asked.
        task: The tensor's task for a method of task vectors.
        method: The method.
        views: The adapters as full models.
        draft: The plan in the making; what this method cannot merge is reported there.
    """
    if task.kind != "merge" or task.base is None:
        return task
    changes = [view.changes for view in views if view.changes is not None]
    updates = [change.updates.get(task.base) for change in changes]
    parts = tuple(map(_module, updates))
    if any(parts):
        joined = JoinedLora(task.base, parts)
        check_factored(method, task, joined, draft)
        dora = joined.dora and any(isinstance(u, LoraUpdate) and u.turned for u in updates)
        peak = factors_bytes(joined, method, task.parameters, draft.compute_dtype)
        return replace(
            task,
            kind="factors",
            models=tuple(part.name if part else None for part in parts),
            peak_bytes=peak + base_bytes(task.info, draft, turned=dora),
        )
    replaced = [task.base in change.replacements for change in changes]
    models = tuple(
        name if here or not any(replaced) else None
        for name, here in zip(task.models, replaced, strict=True)
    )
    parameters, weights = {"scale": 1.0, "normalize": True}, task.weights
    if any(replaced):
        weights = mean_weights(weights, replaced, task.name, draft)
    else:
        zero = request.absent == "zero"
        present = [zero or update is not None for update in updates]
        parameters = {"scale": _strength(task, method, present, draft), "normalize": False}
    return replace(task, method=_SUM, parameters=parameters, models=models, weights=weights)


def joined_updates(views: Sequence[View]) -> dict[str, JoinedLora]:
    """Return the modules of all adapters by the name of the base's weight."""
    changes = [view.changes.updates for view in views if view.changes is not None]
    return {
        name: JoinedLora(name, tuple(_module(own.get(name)) for own in changes))
        for name in dict.fromkeys(name for own in changes for name in own)
        if any(_module(own.get(name)) for own in changes)
    }


def _module(update: object) -> LoraModule | None:
    return update.module if isinstance(update, LoraUpdate) else None


def _strength(task: Task, method: MergeMethod, present: Sequence[bool], draft: Draft) -> float:
    """Return by what the sum of biases is multiplied, so that it follows the weights."""
    settings = Settings(task.weights, dict(task.parameters))
    problem = weight_sum_problem(method, settings, present, task.name)
    weights = [w for w, here in zip(task.weights, present, strict=True) if here]
    strength = None if problem else update_strength(method, task.parameters, weights)
    if strength is None:
        problem = problem or RecipeError(
            "biases need the method's scale, which it finds from a module's factors",
            tensor=task.name,
            remedy="Give it a number for its scale, or write an adapter: --as lora.",
        )
        draft.report_once(problem)
    return strength or 0.0
