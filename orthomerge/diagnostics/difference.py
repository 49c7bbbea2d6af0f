"""How far two checkpoints are apart, tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from orthomerge.checkpoints.dtypes import ITEM_SIZES, torch_dtype
from orthomerge.checkpoints.reader import Checkpoint

__all__ = ["TensorDifference", "compare_tensor", "diff_checkpoints"]

_PIECE = 1 << 18


@dataclass(frozen=True)
class TensorDifference:
    """One tensor's difference.

    Args:
        name: The tensor.
        status: ``equal``, ``changed``, ``only-first``, ``only-second`` or ``shape``.
        relative: ``‖B - A‖_F / ‖A‖_F``; inf where A is zero and B is not, nan where one of them
            is not finite, None where they cannot be compared.
        largest: Largest ``|B - A|`` of an entry.
        cosine: Cosine of the angle between the flattened tensors.
        note: Shapes or dtypes, where they differ.
    """

    name: str
    status: str
    relative: float | None = None
    largest: float | None = None
    cosine: float | None = None
    note: str = ""


def diff_checkpoints(first: Checkpoint, second: Checkpoint) -> list[TensorDifference]:
    """Compare two checkpoints by tensor name, largest relative change first.

    Norms are accumulated in fp64. Tensors that only one has, and those whose shapes differ, come
    before all others.
    """
    names = list(dict.fromkeys([*first.tensors, *second.tensors]))
    found = [compare_tensor(first, second, name) for name in names]
    return sorted(found, key=_order)


def _order(difference: TensorDifference) -> tuple[int, float]:
    if difference.relative is None:
        return 0, 0.0
    return 1, -math.inf if math.isnan(difference.relative) else -difference.relative


def compare_tensor(first: Checkpoint, second: Checkpoint, name: str) -> TensorDifference:
    """Compare one tensor of two checkpoints, in pieces."""
    if name not in first.tensors or name not in second.tensors:
        return TensorDifference(name, "only-first" if name in first.tensors else "only-second")
    a, b = first.tensors[name], second.tensors[name]
    if a.shape != b.shape:
        return TensorDifference(name, "shape", note=f"{list(a.shape)} and {list(b.shape)}")
    note = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}"
    sums = torch.zeros(4, dtype=torch.float64)
    largest = 0.0
    for start in range(0, a.numel, _PIECE):
        count = min(_PIECE, a.numel - start)
        x, y = _piece(first, name, start, count), _piece(second, name, start, count)
        change = y - x
        sums += torch.stack([change @ change, x @ x, y @ y, x @ y])
        largest = max(largest, change.abs().max().item())
    squares, own, other, inner = sums.tolist()
    if squares == 0.0:
        return TensorDifference(name, "equal", 0.0, 0.0, 1.0, note)
    relative = math.sqrt(squares / own) if own else math.inf
    cosine = inner / math.sqrt(own * other) if own and other else 0.0
    return TensorDifference(name, "changed", relative, largest, cosine, note)


def _piece(checkpoint: Checkpoint, name: str, start: int, count: int) -> torch.Tensor:
    dtype = checkpoint.tensors[name].dtype
    item = ITEM_SIZES[dtype]
    raw = torch.empty(count * item, dtype=torch.uint8)
    checkpoint.read_into(name, raw.numpy().data, start * item)
    values = raw.view(torch_dtype(dtype))
    return values.double()
