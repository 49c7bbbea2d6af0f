"""Statistics of the whole model that a method asks for before the first tensor is merged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.coordinates import coordinate_streams
from orthomerge.merging.executors.inputs import open_inputs
from orthomerge.merging.executors.rotation import model_norms
from orthomerge.merging.executors.whole import read_whole
from orthomerge.merging.nesting import surveyed_choice
from orthomerge.merging.plan import Plan, Task
from orthomerge.merging.roles import tensor_role
from orthomerge.merging.spaces import Space
from orthomerge.merging.streams import HeldStream, JoinedStream

__all__ = ["model_survey"]


def model_survey(context: Context) -> Any:
    """Run the survey of the whole model, if a method asks for one; else return None.

    It sees streams that run over all merged tensors, of low-rank factors the models' coordinates in
    the frames they are merged in; in rotation space, a function that measures
    each model's generator.
    """
    found = _surveying_method(context.plan)
    if found is None:
        return None
    survey, space, parameters = found
    tasks = context.plan.merged_tasks
    if tasks[0].kind == "factors":
        coordinates = coordinate_streams(tasks, context)
        # Where no model changes anything there is nothing to look at.
        return survey(coordinates, weights=tasks[0].weights, **parameters) if coordinates else None
    if space is Space.ROTATION:
        return survey(functools.partial(model_norms, tasks, context), **parameters)
    residuals = context.plan.method.residual is not None

    @functools.lru_cache(maxsize=1)  # the models are walked through in step and share the base
    def open_streams(position: int) -> list[Any]:
        context.check_stop()
        if residuals:
            return _residual_streams(tasks[position], context)
        inputs = open_inputs(tasks[position], context, hashing=False)
        return list(inputs.streams(space))

    def opener(model: int) -> Callable[[int], Any]:
        return lambda position: open_streams(position)[model]

    sizes = [task.info.numel for task in tasks]
    streams = [JoinedStream(sizes, opener(model)) for model in range(len(context.plan.models))]
    return survey(streams, weights=tasks[0].weights, **parameters)


def _surveying_method(plan: Plan) -> tuple[Callable[..., Any], Space, dict[str, Any]] | None:
    """Return the survey to run, its method's space and parameters.

    It is the plan's method's, or the one's that is nested in it; outside rotation space only when
    ``scope`` is the model.
    """
    if not plan.merged_tasks:
        return None
    method, parameters = surveyed_choice(plan.method, plan.merged_tasks[0].parameters)
    whole_model = method.space is Space.ROTATION or parameters.get("scope") == "model"
    if method.survey is None or not whole_model:
        return None
    return method.survey, method.space, dict(parameters)


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
