"""How each kind of task is carried out: one module per kind, one function ``run`` in each.

An executor reads through ``streams``, calls the pure method, rounds once and hands the bytes to the
sink. Which tasks run when, and on which thread, is the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orthomerge.merging.executors import copying, elementwise, factors, rotation, whole
from orthomerge.merging.executors.context import Context, Interrupted
from orthomerge.merging.plan import Task, TaskKind

__all__ = ["EXECUTORS", "Context", "Interrupted", "run_tasks"]

#: Task kind -> executor of one task; LoRA modules are run in batches, see ``run_tasks``.
EXECUTORS: dict[TaskKind, Callable[[Task, Context], dict[str, Any]]] = {
    "merge": elementwise.run,
    "whole": whole.run,
    "copy": copying.run,
    "convert": copying.run_conversion,
    "rotate": rotation.run,
}


def run_tasks(tasks: Sequence[Task], context: Context) -> list[dict[str, Any]]:
    """Run a batch of equal tasks, or one alone; return JSON-ready details of each.

    They go to the journal and the report.
    """
    if tasks[0].kind == "factors":
        return factors.run(tasks, context)
    return [EXECUTORS[task.kind](task, context) for task in tasks]
