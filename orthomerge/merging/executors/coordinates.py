"""One stream per model over its coordinates in all modules, for a survey of the whole model.

The coordinates are computed again for each pass, so that only one module is in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.factor_inputs import joined_module, read_factors
from orthomerge.merging.lora.frames import coordinate_shape, lift_of
from orthomerge.merging.lora.lifting import lifted_coordinates
from orthomerge.merging.plan import Task
from orthomerge.merging.streams import HeldStream

__all__ = ["CoordinateStream", "coordinate_streams"]

_SAMPLE = 1 << 15  # entries of each model: taken in the pass that counts, so that none is repeated


class CoordinateStream:
    """One model's coordinates, module after module.

    Args:
        numel: How many there are.
        modules: How many modules.
        items: Gives the coordinates in one module.
        sampled: About ``_SAMPLE`` entries, spread over all modules.
    """

    def __init__(
        self, numel: int, modules: int, items: Callable[[int], Tensor], sampled: Tensor
    ) -> None:
        self.numel = numel
        self._modules, self._items, self._sampled = modules, items, sampled

    def chunks(self) -> Iterator[Tensor]:
        """Yield all of them, one module's at a time."""
        for position in range(self._modules):
            yield self._items(position).reshape(-1)

    def sample(self, count: int) -> Tensor:
        """Return the sample; its size is about ``count`` as surveys ask for it."""
        del count
        return self._sampled


def coordinate_streams(tasks: Sequence[Task], context: Context) -> list[CoordinateStream]:
    """Return the streams; every model must take part in every module."""
    spaces = [lift_of(context.plan.method, task.parameters) for task in tasks]

    @functools.lru_cache(maxsize=1)  # the models are walked through in step
    def items(position: int) -> list[Tensor]:
        context.check_stop()
        inputs = read_factors([tasks[position]], context)
        return lifted_coordinates(inputs.factors, inputs.weights, spaces[position]).items

    def of_model(model: int) -> Callable[[int], Tensor]:
        return lambda position: items(position)[model]

    modules = [joined_module(task, context) for task in tasks]
    largest = [
        math.prod(coordinate_shape(m.rows, m.columns, sum(m.ranks), space))
        for m, space in zip(modules, spaces, strict=True)
    ]
    count = len(context.plan.models)
    sizes = [0] * count
    samples: list[list[Tensor]] = [[] for _ in range(count)]
    for position, entries in enumerate(largest):
        share = math.ceil(_SAMPLE * entries / sum(largest))
        for model, Z in enumerate(items(position)):
            sizes[model] += Z.numel()
            if Z.numel():
                samples[model].append(HeldStream(Z).sample(share)[:share])
    return [
        CoordinateStream(size, len(tasks), of_model(model), torch.cat(samples[model]))
        for model, size in enumerate(sizes)
        if size
    ]
