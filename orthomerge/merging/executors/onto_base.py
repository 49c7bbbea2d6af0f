"""Put a merged low-rank change onto the base's weight: a full weight, or DoRA's magnitudes for it.

The base is read a few rows at a time. Rows and columns are the adapters': o output features, n
input features; layers that store the transposed weight, embeddings among them, are turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.dora import dora_scales
from orthomerge.adapters.lora import LoraAdapter
from orthomerge.adapters.lora_updates import LoraUpdate
from orthomerge.checkpoints.digest import hash_tensor
from orthomerge.checkpoints.dtypes import torch_dtype
from orthomerge.linalg.factors import Factors
from orthomerge.merging.executors.context import Context
from orthomerge.merging.lora.strengths import update_strength
from orthomerge.merging.plan import Task
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.streams import TensorReader

__all__ = [
    "BaseWeight",
    "change_norm",
    "merged_scales",
    "module_updates",
    "own_scales",
    "write_weight",
]


def module_updates(task: Task, context: Context) -> list[LoraUpdate | None]:
    """Return what each adapter does to the base's weight; None where it leaves it alone."""
    name = task.base or ""
    found = [changes.updates.get(name) if changes else None for changes in context.plan.changes]
    return [update if isinstance(update, LoraUpdate) else None for update in found]


class BaseWeight:
    """The base's weight of one module, read a few rows at a time.

    Args:
        task: The module's task.
        context: The running merge.
    """

    def __init__(self, task: Task, context: Context) -> None:
        assert task.base is not None
        assert context.plan.base is not None
        self.name, self.checkpoint = task.base, context.plan.base.checkpoint
        rows, *rest = self.checkpoint.tensors[task.base].shape
        self.rows, self.columns = rows, math.prod(rest)
        first = next(update for update in module_updates(task, context) if update is not None)
        self.turned = first.turned
        self._context = context
        self._digest: str | None = None

    def blocks(self, *, hashing: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) as stored, checked to be finite; a block lives until the next.

        Args:
            hashing: Hash the bytes on the way, so that ``digest`` need not read them again.
        """
        step = self._step(self.columns)
        reader = self._reader(step, hashing=hashing)
        for row in range(0, self.rows, step):
            self._context.check_stop()
            count = min(step, self.rows - row) * self.columns
            yield row, reader.piece(row * self.columns, count).reshape(-1, self.columns)
        self._digest = reader.digest() or self._digest

    def features(self) -> Iterator[Tensor]:
        """Yield the weight as [o, n] in blocks of rows: one row per output feature."""
        if self.turned:
            whole = self._reader(self.rows).piece(0, self.rows * self.columns)
            turned = whole.reshape(self.rows, self.columns).mT
            yield from torch.split(turned, self._step(self.rows))
        else:
            yield from (block for _, block in self.blocks())

    def digest(self) -> str:
        """Return the digest of the stored bytes."""
        return self._digest or hash_tensor(self.checkpoint, self.name)

    def _step(self, width: int) -> int:
        """Return how many rows of this width are worked on at a time."""
        return max(1, self._context.plan.piece_elements // max(1, width))

    def _reader(self, rows: int, *, hashing: bool = False) -> TensorReader:
        size = rows * max(1, self.columns)
        return self._context.reader(
            self.checkpoint, self.name, hashing=hashing, piece_elements=size
        )


def own_scales(
    adapter: LoraAdapter, update: LoraUpdate, factors: Factors, base: BaseWeight
) -> Tensor | None:
    """Return the diagonal with which a DoRA module scales its output features [o], or None."""
    m = adapter.magnitude(update.module.name, factors.B.dtype)
    if m is None:
        return None
    return dora_scales(base.features(), m, factors.B, factors.A)


def merged_scales(
    method: MergeMethod,
    scales: Sequence[Tensor | None],
    weights: Sequence[float],
    parameters: Mapping[str, Any],
    facts: Mapping[str, Any],
    factor: float,
) -> Tensor | None:
    """Merge the diagonals of DoRA modules: ``D = I + c Σ w_i (D_i - I)``; None for I.

    Args:
        method: The method.
        scales: D_i, one per model; None for a model without magnitudes here.
        weights: w_i.
        parameters: The method's; with the weights they make c, see ``update_strength``.
        facts: What the method measured: its scale where that was left to it.
        factor: Multiplies every update, see ``UpdateNorms``.
    """
    if not any(own is not None for own in scales):
        return None
    given = update_strength(method, parameters, weights, measured=facts.get("scale"))
    assert given is not None  # the plan has refused what leaves it open
    strength = factor * given
    merged: Tensor | None = None
    for own, weight in zip(scales, weights, strict=True):
        if own is not None:
            merged = torch.ones_like(own) if merged is None else merged
            merged = merged + strength * weight * (own - 1.0)
    return merged


def change_norm(base: BaseWeight | None, change: Factors, scales: Tensor | None) -> float:
    """Return ``||(D - I) W_0 + B A||_F``, with no dense change in memory.

    Args:
        base: W_0; not read without scales.
        change: B A.
        scales: The diagonal of D [o]; None for the identity.
    """
    if scales is None or base is None:
        return change.norm().item()
    square, row = 0.0, 0
    for block in base.features():
        here = slice(row, row + len(block))
        by = (scales[here] - 1).to(block)[:, None]
        square += _squared_norm(by * block + change.B[here] @ change.A)
        row += len(block)
    return math.sqrt(square)


def write_weight(
    task: Task, context: Context, base: BaseWeight, change: Factors, scales: Tensor | None
) -> float:
    """Write ``D W_0 + B A``, rounded once; return the norm of what was written.

    Args:
        task: The module's task.
        context: The running merge.
        base: W_0.
        change: B A [o, n], in the compute dtype.
        scales: The diagonal of D [o]; None for the identity.
    """
    stored = change.turned() if base.turned else change
    columns, square = stored.A.shape[-1], 0.0
    for row, block in base.blocks(hashing=True):
        if scales is not None:
            by = scales.to(block)
            block = block * (by[None, :] if base.turned else by[row : row + len(block), None])
        block = block + stored.B[row : row + len(block)] @ stored.A
        context.emit(task.info, row * columns, block)
        square += _squared_norm(block.to(torch_dtype(task.info.dtype)))
    return math.sqrt(square)


def _squared_norm(values: Tensor) -> float:
    """Return the sum of squares, in fp64."""
    norm: float = torch.linalg.vector_norm(values, dtype=torch.float64).item()
    return norm**2
