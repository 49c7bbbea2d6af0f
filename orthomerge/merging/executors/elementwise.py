"""Run a method of WEIGHT or DELTA space over a tensor, piece by piece.

A piece is small enough for the processor's cache, so that lifting, arithmetic, hashing and rounding
touch main memory once, and memory does not grow with the tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from orthomerge.merging.executors.context import Context
from orthomerge.merging.plan import Plan, Task
from orthomerge.merging.registry import MergeMethod, get_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.streams import JoinedStream, TensorReader, TensorStream

__all__ = ["model_survey", "run", "surveys_model"]


def run(task: Task, context: Context) -> dict[str, Any]:
    """Merge one tensor; return the digests of what was read."""
    method = get_method(task.method) if task.method else context.plan.method
    weights = [w for w, name in zip(task.weights, task.models, strict=True) if name]
    arguments = dict(task.parameters)
    if method.uses_weights:
        arguments["weights"] = weights
    if method.survey is not None and task.info.numel:
        arguments["survey"] = _survey(method, task, context)
    models, base = _readers(task, context, hashing=True)
    digested = [reader for reader in (base, *models) if reader is not None]
    step = context.plan.piece_elements
    for start in range(0, task.info.numel, step):
        context.check_stop()
        count = min(step, task.info.numel - start)
        pieces = [reader.piece(start, count) for reader in models]
        if method.space is Space.DELTA and base is not None:
            origin = base.piece(start, count)
            merged = method.function(origin, [piece - origin for piece in pieces], **arguments)
        else:
            merged = method.function(pieces, **arguments)
        context.emit(task, start, merged)
        context.advance(sum(reader.nbytes(count) for reader in digested))
    return {"digests": _digests(task, context, base, models)}


def _readers(
    task: Task, context: Context, *, hashing: bool
) -> tuple[list[TensorReader], TensorReader | None]:
    plan = context.plan
    models = [
        context.reader(model.checkpoint, name, hashing=hashing)
        for model, name in zip(plan.models, task.models, strict=True)
        if name is not None
    ]
    base = None
    if task.base is not None and plan.base is not None:
        base = context.reader(plan.base.checkpoint, task.base, hashing=hashing)
    return models, base


def _streams(task: Task, context: Context) -> list[TensorStream]:
    models, base = _readers(task, context, hashing=False)
    return [TensorStream(model, base) for model in models]


def _survey(method: MergeMethod, task: Task, context: Context) -> Any:
    if context.survey is not None:
        return context.survey
    assert method.survey is not None
    weights = [w for w, name in zip(task.weights, task.models, strict=True) if name]
    return method.survey(_streams(task, context), weights=weights, **task.parameters)


def surveys_model(plan: Plan) -> bool:
    """Return whether the method looks at the whole model before it merges."""
    merged = _merged_tasks(plan)
    return (
        plan.method.survey is not None
        and bool(merged)
        and merged[0].parameters.get("scope") == "model"
    )


def model_survey(context: Context) -> Any:
    """Run the method's survey once, on streams that run over all merged tensors."""
    tasks = _merged_tasks(context.plan)
    survey = context.plan.method.survey
    assert survey is not None
    sizes = [task.info.numel for task in tasks]

    @functools.lru_cache(maxsize=1)  # the models are walked through in step and share the base
    def open_streams(position: int) -> list[TensorStream]:
        context.check_stop()
        return _streams(tasks[position], context)

    def opener(model: int) -> Callable[[int], TensorStream]:
        return lambda position: open_streams(position)[model]

    streams = [JoinedStream(sizes, opener(model)) for model in range(len(context.plan.models))]
    return survey(streams, weights=tasks[0].weights, **tasks[0].parameters)


def _merged_tasks(plan: Plan) -> list[Task]:
    return [task for task in plan.tasks if task.kind == "merge" and task.method is None]


def _digests(
    task: Task, context: Context, base: TensorReader | None, models: list[TensorReader]
) -> list[list[str | None]]:
    """Return [tensor name, digest] per source, in the order base, models."""
    hashed = {} if base is None else {-1: base.digest()}
    taking_part = [i for i, name in enumerate(task.models) if name is not None]
    hashed |= {i: reader.digest() for i, reader in zip(taking_part, models, strict=True)}
    names = {-1: task.base, **dict(enumerate(task.models))}
    order = ([-1] if context.plan.base else []) + list(range(len(task.models)))
    return [[names[i], hashed.get(i)] for i in order]
