"""Run a method that needs whole tensors: matrix decompositions, rotations.

One tensor of every model is in memory at a time; how many tasks run at once is the engine's
business, by the memory each declares.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orthomerge.errors import OrthoMergeError
from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.inputs import Inputs, open_inputs
from orthomerge.merging.plan import Task
from orthomerge.merging.roles import tensor_role
from orthomerge.merging.spaces import Space

__all__ = ["read_whole", "run"]


def run(task: Task, context: Context) -> dict[str, Any]:
    """Merge one tensor; return digests and what the method measured."""
    method = context.plan.method
    inputs = open_inputs(
        task, context, hashing=not context.measuring, piece_elements=max(1, task.info.numel)
    )
    origin, tensors = read_whole(task, inputs, method.space)
    context.check_stop()
    try:
        merged = method.call(
            *([origin, tensors] if method.space is Space.DELTA else [tensors]),
            weights=inputs.weights,
            role=tensor_role(task.name, task.info.shape),
            survey=context.survey,
            draws=context.draws(task, inputs.positions),
            **task.parameters,
        )
    except OrthoMergeError as error:
        error.about(task.name)  # the linear algebra does not know the tensor's name
        raise
    context.finish(task, 0, merged.tensor, origin, tensors, method.space)
    context.advance(task.read_bytes)
    return {"digests": inputs.digests(task, context), "facts": dict(merged.facts)}


def read_whole(task: Task, inputs: Inputs, space: Space) -> tuple[Tensor | None, list[Tensor]]:
    """Return the base's tensor and every model's contribution, in the tensor's shape."""
    shape, count = task.info.shape, task.info.numel
    origin = inputs.origin(0, count).reshape(shape) if inputs.base else None
    read = [m.delta if space is Space.DELTA else m.weight for m in inputs.models]
    return origin, [piece(0, count).reshape(shape) for piece in read]
