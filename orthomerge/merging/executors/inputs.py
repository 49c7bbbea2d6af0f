"""Open what a task reads: the base's tensor and every model's contribution to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from orthomerge.adapters.sources import Source
from orthomerge.adapters.updates import AdapterUpdates
from orthomerge.checkpoints.digest import hash_tensor
from orthomerge.merging.contributions import Contribution, FullWeight, NoChange, UpdatedWeight
from orthomerge.merging.executors.context import Context
from orthomerge.merging.plan import Task
from orthomerge.merging.spaces import Space
from orthomerge.merging.streams import TensorReader, TensorStream

__all__ = ["Inputs", "open_inputs"]


@dataclass
class Inputs:
    """An opened task.

    Args:
        base: The base's tensor, if it takes part.
        models: The contributions of the models that have the tensor.
        positions: Which models those are.
        weights: One per contribution.
        numel: Elements of the tensor.
        piece_elements: Most elements per piece.
    """

    base: TensorReader | None
    models: list[Contribution]
    positions: list[int]
    weights: list[float]
    numel: int
    piece_elements: int

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (start, count) of each piece."""
        for start in range(0, self.numel, self.piece_elements):
            yield start, min(self.piece_elements, self.numel - start)

    def share(self, nbytes: int, start: int, count: int) -> int:
        """Return a piece's part of ``nbytes``, such that all pieces' parts add up to it."""
        return nbytes * (start + count) // self.numel - nbytes * start // self.numel

    def origin(self, start: int, count: int) -> Tensor:
        """Return a piece of the base, checked to be finite."""
        assert self.base is not None
        piece = self.base.kept(start, count)
        self.base.check(piece)
        return piece

    def streams(self, space: Space) -> list[TensorStream]:
        """Return each model's contribution in a space as a stream."""

        def read(model: Contribution) -> Callable[[int, int], Tensor]:
            return model.delta if space is Space.DELTA else model.weight

        return [TensorStream(self.numel, read(m), self.piece_elements) for m in self.models]

    def digests(self, task: Task, context: Context) -> list[list[list[str]]]:
        """Return the [tensor name, digest] pairs of each source, in the order base, models."""
        if not context.plan.request.provenance:
            return []
        found: list[list[list[str]]] = [[] for _ in task.models]
        for position, model in zip(self.positions, self.models, strict=True):
            found[position] = [list(pair) for pair in model.digests()]
        if context.plan.base is None:
            return found
        read = self.base.digest() if self.base else None
        return [[[task.base, read]] if task.base and read else [], *found]


def open_inputs(
    task: Task, context: Context, *, hashing: bool, piece_elements: int | None = None
) -> Inputs:
    """Open the tensors a task reads."""
    plan = context.plan
    size = piece_elements or plan.piece_elements
    base = None
    if task.base is not None and plan.base is not None:
        checkpoint = plan.base.checkpoint
        base = context.reader(checkpoint, task.base, hashing=hashing, piece_elements=size)
    models: list[Contribution] = []
    positions = [at for at, name in enumerate(task.models) if name is not None]
    for at in positions:
        source, changes, name = plan.models[at], plan.changes[at], task.models[at]
        assert name is not None
        if changes is None or base is None:  # without the base it is a tensor of the source's own
            reader = context.reader(source.checkpoint, name, hashing=hashing, piece_elements=size)
            models.append(FullWeight(name, reader, base))
        else:
            models.append(_adapter(name, source, changes, base, task, context, hashing, size))
    weights = [task.weights[at] for at in positions]
    return Inputs(base, models, positions, weights, task.info.numel, size)


def _adapter(
    name: str,
    source: Source,
    changes: AdapterUpdates,
    base: TensorReader,
    task: Task,
    context: Context,
    hashing: bool,
    size: int,
) -> Contribution:
    replacement, update = changes.replacements.get(name), changes.updates.get(name)
    if replacement is not None:
        reader = context.reader(
            source.checkpoint, replacement, hashing=hashing, piece_elements=size
        )
        return FullWeight(replacement, reader, base)
    if update is None:
        return NoChange(base)
    shape = task.info.shape
    W0 = None
    if update.needs_base:
        assert context.plan.base is not None
        checkpoint = context.plan.base.checkpoint
        whole = context.reader(checkpoint, name, piece_elements=task.info.numel)
        W0 = whole.piece(0, task.info.numel).reshape(shape)
    change = update.delta(W0, shape, context.compute).to(context.device)
    keys = update.keys if hashing and context.plan.request.provenance else ()
    digests = {key: hash_tensor(source.checkpoint, key) for key in keys}
    return UpdatedWeight(update, change, base, source.origin, digests)
