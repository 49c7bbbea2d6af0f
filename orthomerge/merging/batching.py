"""Put tasks of equal shape together, so that small matrices are merged many at a time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from orthomerge.merging.plan import Plan, Task

__all__ = ["batched_tasks"]

# A batch saves Python and launches on small modules; beyond the cache it only costs memory.
_CPU_BYTES = 32 << 20
_GPU_BYTES = 1 << 30


def batched_tasks(tasks: Sequence[Task], plan: Plan) -> list[list[Task]]:
    """Return the tasks in groups of equal ``batch``, each within a share of the budget.

    Args:
        tasks: What to run, in order.
        plan: Says where it runs, and within which budget.
    """
    most = _CPU_BYTES if plan.request.device == "cpu" else _GPU_BYTES
    most = min(most, plan.budget_bytes // max(1, plan.workers))
    batches: list[list[Task]] = []
    filling: dict[Hashable, list[Task]] = {}
    for task in tasks:
        batch = filling.get(task.batch) if task.batch is not None else None
        if batch is None or (len(batch) + 1) * task.peak_bytes > most:
            batch = []
            batches.append(batch)
            filling[task.batch] = batch
        batch.append(task)
    return batches
