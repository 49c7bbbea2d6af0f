"""Merge one OFT module: average the generators, then store them or rotate the base's weight.

The small blocks are handled in fp64; the base's weight is rotated a few rows at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.effective import apply_rotation, rotation
from orthomerge.adapters.export import stored_from_canonical
from orthomerge.adapters.oft import OftAdapter
from orthomerge.checkpoints.digest import hash_tensor
from orthomerge.errors import NumericalError
from orthomerge.linalg import align_blocks, orthogonality
from orthomerge.merging.executors.context import Context
from orthomerge.merging.oft_modules import JoinedModule, join_module
from orthomerge.merging.plan import Task

__all__ = ["run"]


def run(task: Task, context: Context) -> dict[str, Any]:
    """Merge one module; return digests and what was measured on the way."""
    plan = context.plan
    adapters = [model.oft for model in plan.models if model.oft is not None]
    name = next(name for name in task.models if name is not None)
    module = join_module(name, tuple(adapter.modules.get(name) for adapter in adapters))
    stored = [_generator(adapter, name, module).to(context.device) for adapter in adapters]
    generators = align_blocks(stored, module.num_blocks * module.block_size)
    merged = plan.method.function(list(generators), weights=list(task.weights), **task.parameters)
    if not bool(torch.isfinite(merged).all()):
        raise NumericalError("the merged generator is not finite", tensor=name)
    assert plan.convention is not None
    R = rotation(merged, plan.convention)
    digests = _digests(task, context, adapters)
    if task.base is None:
        context.emit(task, 0, stored_from_canonical(merged, module.kind, plan.convention))
        context.advance(task.read_bytes)
    else:
        digests[0][1] = _rotate_base(task, context, R.to(context.compute), module.shared)
    return {"digests": digests, "rotation": _measures(generators, merged, R)}


def _generator(adapter: OftAdapter, name: str, module: JoinedModule) -> Tensor:
    """Return an adapter's generator in its own blocks; zeros where it has none."""
    if name in adapter.modules:
        return adapter.skew(name, torch.float64)
    shape = module.num_blocks, module.block_size, module.block_size
    return torch.zeros(shape, dtype=torch.float64)


def _rotate_base(task: Task, context: Context, R: Tensor, shared: bool) -> str | None:
    base = context.plan.base
    assert base is not None
    assert task.base is not None
    columns = math.prod(task.info.shape[1:])
    rows = max(1, context.plan.piece_elements // columns)
    reader = context.reader(base.checkpoint, task.base, hashing=True, piece_elements=rows * columns)
    for row in range(0, task.info.shape[0], rows):
        context.check_stop()
        count = min(rows, task.info.shape[0] - row) * columns
        piece = reader.piece(row * columns, count).reshape(-1, columns)
        context.emit(task, row * columns, apply_rotation(piece, R, shared=shared, name=task.name))
        context.advance(reader.nbytes(count))
    return reader.digest()


def _digests(task: Task, context: Context, adapters: list[OftAdapter]) -> list[list[str | None]]:
    digests: list[list[str | None]] = [[task.base, None]] if context.plan.base else []
    for model, adapter, name in zip(context.plan.models, adapters, task.models, strict=True):
        key = adapter.modules[name].key if name else None
        hashing = key is not None and context.plan.request.provenance
        digests.append([key, hash_tensor(model.checkpoint, key) if key and hashing else None])
    return digests


def _measures(generators: Tensor, merged: Tensor, R: Tensor) -> dict[str, float]:
    """Return norms, the largest angle in degrees and the distance from orthogonality."""
    norm = torch.linalg.vector_norm
    largest = torch.linalg.matrix_norm(merged, ord=2).max().item()
    return {
        "mean_norm": sum(norm(A).item() for A in generators) / len(generators),
        "merged_norm": norm(merged).item(),
        "largest_angle_degrees": math.degrees(2 * math.atan(largest)),
        "orthogonality_residual": float(orthogonality(R)[1]),
    }
