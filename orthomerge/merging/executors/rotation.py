"""Merge one rotated module: average the generators, then store them or rotate the base's weight.

The blocks are handled in fp64; the base's weight is rotated a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.effective import apply_rotation, rotate_rows, rotation
from orthomerge.adapters.export import stored_from_canonical
from orthomerge.adapters.rotated import RotationAdapter
from orthomerge.checkpoints.digest import hash_tensor
from orthomerge.errors import NumericalError
from orthomerge.linalg import align_blocks, orthogonality
from orthomerge.merging.executors.context import Context
from orthomerge.merging.oft_modules import JoinedModule, join_module
from orthomerge.merging.plan import Task

__all__ = ["model_norms", "run"]


def run(task: Task, context: Context) -> dict[str, Any]:
    """Merge one module; return digests and what was measured on the way."""
    plan = context.plan
    adapters, module, generators = _generators(task, context)
    merged = plan.method.call(
        list(generators), weights=list(task.weights), survey=context.survey, **task.parameters
    ).tensor
    if context.norms is not None:
        context.norms.add(merged, list(generators))
        return {}
    merged = merged * context.factor
    if not bool(torch.isfinite(merged).all()):
        raise NumericalError("the merged generator is not finite", tensor=task.name)
    assert plan.convention is not None
    R = rotation(merged, plan.convention)
    digests = _digests(task, context, adapters) if plan.request.provenance else []
    if task.base is None:
        context.emit(task.info, 0, stored_from_canonical(merged, module.kind, plan.convention))
        context.advance(task.read_bytes)
    else:
        s = _merged_scale(adapters, module, task.weights) if module.scaled else None
        read = _rotate_base(task, context, R.to(context.compute), module, s)
        if read:
            digests[0].append([task.base, read])
    return {"digests": digests, "rotation": _measures(generators, merged, R)}


def model_norms(tasks: Sequence[Task], context: Context) -> list[float]:
    """Return each model's ‖A_i‖_F over all its modules."""
    squares = [0.0] * len(context.plan.models)
    for task in tasks:
        context.check_stop()
        for at, A in enumerate(_generators(task, context)[2]):
            squares[at] += torch.linalg.vector_norm(A, dtype=torch.float64).item() ** 2
    return [math.sqrt(square) for square in squares]


def _generators(task: Task, context: Context) -> tuple[list[RotationAdapter], JoinedModule, Tensor]:
    """Read every adapter's generator of one module, in blocks of one size."""
    adapters = [model.rotations for model in context.plan.models if model.rotations is not None]
    name = task.module
    module = join_module(name, tuple(adapter.modules.get(name) for adapter in adapters))
    stored = [_generator(adapter, name, module).to(context.device) for adapter in adapters]
    return adapters, module, align_blocks(stored, module.num_blocks * module.block_size)


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
        context.emit(task.info, row * columns, turned)
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
) -> list[list[list[str | None]]]:
    """Return [tensor name, digest] pairs of each source; the base's are added when it is read."""
    digests: list[list[list[str | None]]] = [[]] if context.plan.base else []
    for model, adapter, name in zip(context.plan.models, adapters, task.models, strict=True):
        keys = adapter.modules[name].keys if name else ()
        digests.append([[key, hash_tensor(model.checkpoint, key)] for key in keys])
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
