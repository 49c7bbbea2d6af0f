"""How far two models are apart in bounded memory: tensor by tensor, LoRA adapters by their changes.

The factors of a LoRA adapter are compared by their product ``B A``, which is never formed: many
factors make one product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from orthomerge.adapters.lora import LoraAdapter, LoraModule
from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.dtypes import ITEM_SIZES, torch_dtype
from orthomerge.checkpoints.reader import Checkpoint
from orthomerge.errors import NumericalError
from orthomerge.linalg.factors import Factors, concatenated, singular_values

__all__ = ["TensorDifference", "compare_tensor", "diff_checkpoints", "diff_sources"]

_PIECE = 1 << 18


@dataclass(frozen=True)
class TensorDifference:
    """One tensor's difference, or that of what two LoRA adapters change in one module.

    Args:
        name: The tensor, or the module.
        status: ``equal``, ``changed``, ``only-first``, ``only-second`` or ``shape``.
        relative: ``‖B - A‖_F / ‖A‖_F``; inf where A is zero and B is not, nan where one of them
            is not finite, None where they cannot be compared.
        largest: Largest ``|B - A|`` of an entry; None for a module.
        cosine: Cosine of the angle between the flattened tensors.
        note: Shapes, ranks or dtypes, where they differ.
    """

    name: str
    status: str
    relative: float | None = None
    largest: float | None = None
    cosine: float | None = None
    note: str = ""


def diff_sources(first: Source, second: Source) -> list[TensorDifference]:
    """Compare two models, largest relative change first: LoRA adapters by what they change.

    ``‖B_2 A_2 - B_1 A_1‖_F / ‖B_1 A_1‖_F`` per module, scales folded in, in float64; biases,
    DoRA's magnitudes and whole tensors one by one. All other models as ``diff_checkpoints`` does.
    """
    a, b = first.lora, second.lora
    if a is None or b is None:
        return diff_checkpoints(first.checkpoint, second.checkpoint)
    found: list[TensorDifference] = []
    for name in dict.fromkeys([*a.modules, *b.modules]):
        if name in a.modules and name in b.modules:
            found += _compare_modules(a, b, name)
        else:
            found.append(_one_sided(name, name in a.modules))
    whole = [key for own in (a, b) for key in (*own.others.values(), *own.base_copies.values())]
    for key in dict.fromkeys(whole):
        found.append(compare_tensor(first.checkpoint, second.checkpoint, key))
    return sorted(found, key=_order)


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
        return _one_sided(name, name in first.tensors)
    a, b = first.tensors[name], second.tensors[name]
    if a.shape != b.shape:
        return TensorDifference(name, "shape", note=f"{list(a.shape)} and {list(b.shape)}")
    note = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}"
    sums = torch.zeros(4, dtype=torch.float64)
    largest = 0.0
    for start in range(0, a.numel, _PIECE):
        count = min(_PIECE, a.numel - start)
        x, y = _piece(first, name, start, count), _piece(second, name, start, count)
        sums += _sums(x, y)
        largest = max(largest, (y - x).abs().max().item())
    return _difference(name, sums, largest, note)


def _one_sided(name: str, in_first: bool) -> TensorDifference:
    return TensorDifference(name, "only-first" if in_first else "only-second")


def _sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``‖y - x‖²``, ``‖x‖²``, ``‖y‖²`` and ``<x, y>`` of vectors."""
    change = y - x
    return torch.stack([change @ change, x @ x, y @ y, x @ y])


def _difference(
    name: str, sums: torch.Tensor, largest: float | None, note: str
) -> TensorDifference:
    squares, own, other, inner = sums.tolist()
    if squares == 0.0:
        zero = None if largest is None else 0.0
        return TensorDifference(name, "equal", 0.0, zero, 1.0, note)
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


def _compare_modules(a: LoraAdapter, b: LoraAdapter, name: str) -> list[TensorDifference]:
    """Compare what two adapters do to one module: its weight, its bias, its magnitudes."""
    x, y = a.modules[name], b.modules[name]
    shapes = [x.rows, *x.shape], [y.rows, *y.shape]
    if shapes[0] != shapes[1]:
        return [TensorDifference(name, "shape", note=f"{shapes[0]} and {shapes[1]}")]
    try:
        X, Y = (Factors(*own.factors(name, torch.float64)) for own in (a, b))
        return [_compare_products(X, Y, x, y), *_compare_vectors(a, b, name)]
    except NumericalError:
        return [TensorDifference(name, "changed", math.nan, note="not finite")]


def _compare_products(X: Factors, Y: Factors, x: LoraModule, y: LoraModule) -> TensorDifference:
    """Compare ``Y.B Y.A`` with ``X.B X.A`` through ``[Y.B X.B] [Y.A; -X.A]``."""
    distance = singular_values(concatenated([Y, X], [1.0, -1.0])).norm()
    sums = torch.stack([distance**2, X.norm() ** 2, Y.norm() ** 2, X.inner(Y)])
    notes = [f"rank {x.rank} and {y.rank}"] if x.rank != y.rank else []
    notes += [f"{x.dtype} and {y.dtype}"] if x.dtype != y.dtype else []
    # Four factors were rounded by at most eps/2 of each entry.
    coarser = max((x.dtype, y.dtype), key=lambda dtype: torch.finfo(torch_dtype(dtype)).eps)
    size = max(F.B.norm() * F.A.norm() for F in (X, Y))
    if 0 < distance <= 2 * torch.finfo(torch_dtype(coarser)).eps * size:
        notes.append(f"no more than {coarser} rounds")
    return _difference(x.name, sums, None, ", ".join(notes))


def _compare_vectors(a: LoraAdapter, b: LoraAdapter, name: str) -> Iterator[TensorDifference]:
    """Compare the biases and the magnitudes of one module."""
    for part, read in (("bias", LoraAdapter.bias), ("magnitude", LoraAdapter.magnitude)):
        x, y = (read(own, name, torch.float64) for own in (a, b))
        if x is not None and y is not None:
            largest = (y - x).abs().max().item()
            yield _difference(f"{name}.{part}", _sums(x, y), largest, "")
        elif x is not None or y is not None:
            yield _one_sided(f"{name}.{part}", x is not None)
