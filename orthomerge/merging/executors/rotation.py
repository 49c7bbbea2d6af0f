"""Merge one rotated module: average the generators, then store them or rotate the base's weight.

The blocks are handled in fp64; the base's weight is rotated a few rows at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.effective import apply_rotation, rotate_rows, rotation
from orthomerge.adapters.export import stored_from_canonical
from orthomerge.adapters.rotated import RotationAdapter
from orthomerge.checkpoints.digest import hash_tensor, tensor_hasher
from orthomerge.checkpoints.reader import Checkpoint
from orthomerge.errors import NumericalError
from orthomerge.linalg import align_blocks, orthogonality
from orthomerge.merging.executors.context import Context
from orthomerge.merging.oft_modules import JoinedModule, join_module
from orthomerge.merging.plan import Task

__all__ = ["run"]


def run(task: Task, context: Context) -> dict[str, Any]:
    """Merge one module; return digests and what was measured on the way."""
    plan = context.plan
    adapters = [model.rotations for model in plan.models if model.rotations is not None]
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
        s = _merged_scale(adapters, module, task.weights) if module.scaled else None
        digests[0][1] = _rotate_base(task, context, R.to(context.compute), module, s)
    return {"digests": digests, "rotation": _measures(generators, merged, R)}


def _generator(adapter: RotationAdapter, name: str, module: JoinedModule) -> Tensor:
    """Return an adapter's generator in its own blocks; zeros where it has none."""
    if name in adapter.modules:
        return adapter.skew(name, torch.float64)
    shape = module.num_blocks, module.block_size, module.block_size
    return torch.zeros(shape, dtype=torch.float64)


def _merged_scale(
    adapters: list[RotationAdapter], module: JoinedModule, weights: tuple[float, ...]
) -> Tensor:
    """Return the weighted geometric mean of the output scales, 1 where an adapter has none.

    ``s = sign * exp(sum_i w_i log |s_i| / sum_i w_i)``: scales multiply, so their logarithms are
    averaged, as the rotations' generators are. Equal weights where they sum to zero.
    """
    scales = [
        adapter.scale(module.name, torch.float64) if module.name in adapter.modules else None
        for adapter in adapters
    ]
    rows = next(len(s) for s in scales if s is not None)
    stacked = torch.stack([torch.ones(rows).double() if s is None else s.cpu() for s in scales])
    signs = stacked.sign()
    if bool((signs != signs[0]).any()) or bool((signs == 0).any()):
        raise NumericalError(
            "the adapters' output scales are zero or differ in sign, so they have no mean",
            tensor=module.name,
            remedy="Use --method orthomerge-decoupled with --base.",
        )
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum() if float(w.sum()) else torch.full_like(w, 1 / len(w))
    return signs[0] * (w @ stacked.abs().log()).exp()


def _rotate_base(
    task: Task, context: Context, R: Tensor, module: JoinedModule, s: Tensor | None
) -> str | None:
    base = context.plan.base
    assert base is not None
    assert task.base is not None
    columns = math.prod(task.info.shape[1:])
    rows = max(1, context.plan.piece_elements // columns)
    if module.side == "left":  # whole blocks of rows
        rows = max(1, rows // module.block_size) * module.block_size
    s = None if s is None else s.to(R)
    reader = context.reader(base.checkpoint, task.base, hashing=True, piece_elements=rows * columns)
    for row in range(0, task.info.shape[0], rows):
        context.check_stop()
        count = min(rows, task.info.shape[0] - row) * columns
        piece = reader.piece(row * columns, count).reshape(-1, columns)
        turned = _turn(piece, R, module, row)
        if s is not None:
            turned = turned * s[row : row + len(piece), None]
        context.emit(task, row * columns, turned)
        context.advance(reader.nbytes(count))
    return reader.digest()


def _turn(piece: Tensor, R: Tensor, module: JoinedModule, row: int) -> Tensor:
    """Rotate some rows of the base's weight, from ``row`` on."""
    if module.side == "right":
        return apply_rotation(piece, R, shared=module.shared, name=module.name)
    first, count = row // module.block_size, -(-len(piece) // module.block_size)
    blocks = R.expand(count, -1, -1) if module.shared else R[first : first + count]
    return rotate_rows(piece, blocks)


def _digests(
    task: Task, context: Context, adapters: list[RotationAdapter]
) -> list[list[str | None]]:
    digests: list[list[str | None]] = [[task.base, None]] if context.plan.base else []
    for model, adapter, name in zip(context.plan.models, adapters, task.models, strict=True):
        keys = adapter.modules[name].keys if name else ()
        hashing = bool(keys) and context.plan.request.provenance
        digest = _joint_digest(model.checkpoint, keys) if hashing else None
        digests.append([keys[0] if keys else None, digest])
    return digests


def _joint_digest(checkpoint: Checkpoint, keys: tuple[str, ...]) -> str:
    """Return the digest of a module's tensor, or of its tensors' digests."""
    found = [hash_tensor(checkpoint, key) for key in keys]
    if len(found) == 1:
        return found[0]
    hasher = tensor_hasher()
    hasher.update("".join(found).encode())
    return hasher.hexdigest()


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
