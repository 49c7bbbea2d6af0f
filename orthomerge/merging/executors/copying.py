"""Take a tensor over from one source: byte for byte, or in another floating dtype.

Used for tensors that cannot be averaged (integers), that only one source has, or that need no
arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch

from orthomerge.checkpoints.digest import tensor_hasher
from orthomerge.checkpoints.dtypes import FLOAT_DTYPES, ITEM_SIZES, torch_dtype
from orthomerge.errors import TensorMismatchError
from orthomerge.merging.executors.context import Context
from orthomerge.merging.plan import Task
from orthomerge.merging.streams import check_finite

__all__ = ["run", "run_conversion"]

_BLOCK_BYTES = 1 << 20


def run(task: Task, context: Context) -> dict[str, Any]:
    """Copy the first source's bytes; refuse when another's differ, or when they are not finite."""
    sources = [(c, name) for c, name in context.checkpoints(task) if name is not None]
    buffers = [memoryview(bytearray(min(_BLOCK_BYTES, task.info.nbytes))) for _ in sources]
    hashers = [tensor_hasher() for _ in sources]
    for start in range(0, task.info.nbytes, _BLOCK_BYTES):
        context.check_stop()
        count = min(_BLOCK_BYTES, task.info.nbytes - start)
        blocks = [buffer[:count] for buffer in buffers]
        for (checkpoint, name), block, hasher in zip(sources, blocks, hashers, strict=True):
            checkpoint.read_into(name, block, start)
            if context.plan.request.provenance:
                hasher.update(block)
            if block != blocks[0]:
                raise _differs(task, sources[0][0].origin, checkpoint.origin)
        if task.info.dtype in FLOAT_DTYPES:
            values = torch.frombuffer(blocks[0], dtype=torch_dtype(task.info.dtype))
            check_finite(values.to(context.compute), sources[0][0].origin, task.name, "the input")
        context.sink.write(task.name, start, blocks[0])
        context.advance(count * len(sources))
    digests = iter(hasher.hexdigest() for hasher in hashers)
    named = [[[name, next(digests)]] if name else [] for _, name in context.checkpoints(task)]
    return {"digests": named if context.plan.request.provenance else []}


def run_conversion(task: Task, context: Context) -> dict[str, Any]:
    """Copy the first source's values in the output's dtype."""
    entries = context.checkpoints(task)
    position = next(i for i, (_, name) in enumerate(entries) if name is not None)
    checkpoint, name = entries[position]
    assert name is not None
    reader = context.reader(checkpoint, name, hashing=True)
    step = context.plan.piece_elements
    for start in range(0, task.info.numel, step):
        context.check_stop()
        count = min(step, task.info.numel - start)
        context.emit(task.info, start, reader.piece(start, count))
        context.advance(count * ITEM_SIZES[checkpoint.tensors[name].dtype])
    digests: list[list[list[str]]] = [[] for _ in entries]
    if found := reader.digest():
        digests[position].append([name, found])
    return {"digests": digests}


def _differs(task: Task, first: str, other: str) -> TensorMismatchError:
    return TensorMismatchError(
        f"this {task.info.dtype} tensor differs between {first} and {other}, "
        "and integers cannot be averaged",
        tensor=task.name,
        remedy="Dequantise quantised checkpoints first; merge models with equal buffers.",
    )
