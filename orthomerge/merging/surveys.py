"""Statistics of the whole model that a method asks for before the first tensor is merged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.inputs import open_inputs
from orthomerge.merging.executors.rotation import model_norms
from orthomerge.merging.executors.whole import read_whole
from orthomerge.merging.plan import MERGED_KINDS, Plan, Task
from orthomerge.merging.registry import MergeMethod, get_method
from orthomerge.merging.roles import tensor_role
from orthomerge.merging.spaces import Space
from orthomerge.merging.streams import HeldStream, JoinedStream

__all__ = ["model_survey", "surveying_method"]


def surveying_method(plan: Plan) -> tuple[MergeMethod, dict[str, Any]] | None:
    """Return the method that looks at the whole model first, and its parameters, if one does.

    That is the plan's method, or the one nested in it, when its ``scope`` is the model.
    """
    tasks = _merged_tasks(plan)
    if not tasks:
        return None
    parameters = dict(tasks[0].parameters)
    if plan.method.space is Space.ROTATION:
        return (plan.method, parameters) if plan.method.survey is not None else None
    nested = [v for k, v in parameters.items() if v and plan.method.parameters[k].kind is dict]
    for choice in nested:
        parameters = dict(choice)
        method = get_method(parameters.pop("method"))
        if method.survey is not None and parameters.get("scope") == "model":
            return method, parameters
        return None
    if plan.method.survey is not None and parameters.get("scope") == "model":
        return plan.method, parameters
    return None


def model_survey(context: Context) -> Any:
    """Run the survey once, on streams that run over all merged tensors."""
    found = surveying_method(context.plan)
    assert found is not None
    method, parameters = found
    tasks = _merged_tasks(context.plan)
    assert method.survey is not None
    if method.space is Space.ROTATION:
        return method.survey(model_norms(tasks, context), **parameters)
    residuals = context.plan.method.residual is not None

    @functools.lru_cache(maxsize=1)  # the models are walked through in step and share the base
    def open_streams(position: int) -> list[Any]:
        context.check_stop()
        if residuals:
            return _residual_streams(tasks[position], context)
        inputs = open_inputs(tasks[position], context, hashing=False)
        return list(inputs.streams(method.space))

    def opener(model: int) -> Callable[[int], Any]:
        return lambda position: open_streams(position)[model]

    sizes = [task.info.numel for task in tasks]
    streams = [JoinedStream(sizes, opener(model)) for model in range(len(context.plan.models))]
    return method.survey(streams, weights=tasks[0].weights, **parameters)


def _merged_tasks(plan: Plan) -> list[Task]:
    return [task for task in plan.tasks if task.kind in MERGED_KINDS and task.method is None]


def _residual_streams(task: Task, context: Context) -> list[_ResidualStream]:
    inputs = open_inputs(task, context, hashing=False, piece_elements=max(1, task.info.numel))
    origin, deltas = read_whole(task, inputs, Space.DELTA)
    assert origin is not None
    residual = context.plan.method.residual
    assert residual is not None
    role = tensor_role(task.name, task.info.shape)
    piece = context.plan.piece_elements

    def compute(model: int) -> Callable[[], Tensor]:
        return lambda: residual(origin, deltas, model, role=role, **task.parameters)

    return [_ResidualStream(compute(i), task.info.numel, piece) for i in range(len(deltas))]


class _ResidualStream:
    """What one model leaves to the nested method, computed when it is asked for."""

    def __init__(self, compute: Callable[[], Tensor], numel: int, piece_elements: int) -> None:
        self.numel = numel
        self._compute, self._piece = compute, piece_elements

    def chunks(self) -> Iterator[Tensor]:
        with torch.inference_mode():
            yield from HeldStream(self._compute(), self._piece).chunks()

    def sample(self, count: int) -> Tensor:
        return HeldStream(self._compute(), self._piece).sample(count)
