"""Run a method of WEIGHT or DELTA space over a tensor, piece by piece.

A piece is small enough for the processor's cache, so that lifting, arithmetic, hashing and rounding
touch main memory once, and memory does not grow with the tensor.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.inputs import Inputs, open_inputs
from orthomerge.merging.plan import Task
from orthomerge.merging.registry import MergeMethod, get_method
from orthomerge.merging.spaces import Space

__all__ = ["run"]


def run(task: Task, context: Context) -> dict[str, Any]:
    """Merge one tensor; return the digests of what was read."""
    method = get_method(task.method) if task.method else context.plan.method
    inputs = open_inputs(task, context, hashing=not context.measuring)
    arguments = dict(task.parameters)
    if method.survey is not None and task.info.numel:
        arguments["survey"] = _survey(method, task, context)
    draws = context.draws(task, inputs.positions)
    for start, count in inputs.ranges():
        context.check_stop()
        supplied = {"weights": inputs.weights, "draws": draws.at(start)}
        origin: Tensor | None
        if method.space is Space.DELTA:
            origin = inputs.origin(start, count)
            pieces = [model.delta(start, count) for model in inputs.models]
            merged = method.call(origin, pieces, **supplied, **arguments)
        else:
            origin = inputs.origin(start, count) if inputs.base else None
            pieces = [model.weight(start, count) for model in inputs.models]
            merged = method.call(pieces, **supplied, **arguments)
        context.finish(task, start, merged.tensor, origin, pieces, method.space)
        context.advance(inputs.share(task.read_bytes, start, count))
    return {"digests": inputs.digests(task, context)}


def _survey(method: MergeMethod, task: Task, context: Context) -> Any:
    if context.survey is not None:
        return context.survey
    assert method.survey is not None
    inputs: Inputs = open_inputs(task, context, hashing=False)
    streams = inputs.streams(method.space)
    return method.survey(streams, weights=inputs.weights, **task.parameters)
