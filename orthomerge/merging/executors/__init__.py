"""How each kind of task is carried out: one module per kind, one function ``run`` in each.

An executor reads through ``streams``, calls the pure method, rounds once and hands the bytes to the
sink. Which tasks run when, and on which thread, is the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orthomerge.merging.executors import copying, elementwise, rotation, whole
from orthomerge.merging.executors.context import Context, Interrupted
from orthomerge.merging.plan import Task, TaskKind

__all__ = ["EXECUTORS", "Context", "Interrupted"]

#: Task kind -> executor; each returns JSON-ready details for the journal and the report.
EXECUTORS: dict[TaskKind, Callable[[Task, Context], dict[str, Any]]] = {
    "merge": elementwise.run,
    "whole": whole.run,
    "copy": copying.run,
    "convert": copying.run_conversion,
    "rotate": rotation.run,
}
