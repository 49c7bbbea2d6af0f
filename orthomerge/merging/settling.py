"""Settle what a plan left to the data: the ranks of a merged adapter, before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orthomerge.checkpoints.layout import plan_layout
from orthomerge.merging.engine import measure_spectra
from orthomerge.merging.plan import Plan, Task

__all__ = ["settled"]


def settled(plan: Plan) -> Plan:
    """Return the plan with every rank decided; it is the plan itself if nothing was open.

    The merge runs once without writing, to learn the singular values of every merged module.

    Raises:
        RecipeError: The budget of parameters is too small for rank 1 everywhere.
    """
    output = plan.lora
    if output is None or not output.from_data:
        return plan
    ranks = output.ranks(measure_spectra(plan))
    tasks = tuple(_with_rank(task, plan, ranks) for task in plan.tasks)
    files = {**plan.written_files, **output.files(ranks)}
    shard = plan.layout.shards[0]  # PEFT reads an adapter from one file
    layout = plan_layout(
        [info for task in tasks for info in task.outputs],
        max_shard_bytes=1 << 62,
        filename=shard.filename,
        metadata={**shard.metadata, **output.metadata(ranks)},
    )
    return replace(plan, tasks=tasks, written_files=files, layout=layout)


def _with_rank(task: Task, plan: Plan, ranks: Mapping[str, int]) -> Task:
    if task.kind != "factors" or plan.lora is None:
        return task
    info, *partners = plan.lora.infos(task.module, ranks[task.module])
    batch = None if task.batch is None else (task.batch, info.shape)
    return replace(task, info=info, partners=tuple(partners), batch=batch)
