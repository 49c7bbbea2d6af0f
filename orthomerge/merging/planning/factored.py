"""Turn tasks of a full checkpoint into merges of low-rank factors, where adapters change a weight.

What adapters carry beside their factors, biases and trained heads, is added or averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orthomerge.adapters.lora_updates import LoraUpdate
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.plan import Task
from orthomerge.merging.planning.carried import mean_weights
from orthomerge.merging.planning.draft import Draft
from orthomerge.merging.planning.memory import factors_bytes
from orthomerge.merging.planning.model_scope import check_factored
from orthomerge.merging.planning.views import View
from orthomerge.merging.registry import MergeMethod

__all__ = ["factored_task"]

_SUM = "task-arithmetic"


def factored_task(task: Task, method: MergeMethod, views: Sequence[View], draft: Draft) -> Task:
    """Return the task of one tensor for a method of low-rank factors.

    Args:
        task: The tensor's task for a method of task vectors.
        method: The method.
        views: The adapters as full models.
        draft: The plan in the making; what this method cannot merge is reported there.
    """
    if task.kind != "merge" or task.base is None:
        return task
    changes = [view.changes for view in views if view.changes is not None]
    updates = [change.updates.get(task.base) for change in changes]
    parts = tuple(update.module if isinstance(update, LoraUpdate) else None for update in updates)
    if any(parts):
        joined = JoinedLora(task.base, parts)
        check_factored(method, task, joined, draft)
        return replace(
            task,
            kind="factors",
            models=tuple(part.name if part else None for part in parts),
            peak_bytes=factors_bytes(joined, method, draft.compute_dtype) + task.peak_bytes,
        )
    replaced = [task.base in change.replacements for change in changes]
    models = tuple(
        name if here or not any(replaced) else None
        for name, here in zip(task.models, replaced, strict=True)
    )
    weights = task.weights
    if any(replaced):
        weights = mean_weights(weights, replaced, task.name, draft)
    sum_or_mean = {"scale": 1.0, "normalize": any(replaced)}
    return replace(task, method=_SUM, parameters=sum_or_mean, models=models, weights=weights)
