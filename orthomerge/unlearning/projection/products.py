"""Inner products of long vectors, accurate enough for projections, and their sum over shards.

Nothing here knows what the vectors mean. Callers hold ``full_precision`` around many calls: TF32
would cost the products their digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["average_", "combine", "products", "squared_norm", "summed"]

BLOCK = 4096  # float32 products are summed over so many entries, and then in float64
_SMALL = 1 << 14  # below this many entries everything is float64
_CHUNK = {"cpu": 1 << 17, "other": 1 << 22}  # columns in flight: cache on a CPU, launches on a GPU


def products(
    X: torch.Tensor, Y: torch.Tensor | Sequence[torch.Tensor], P: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``X diag(P) Y^T`` in float64 without lifting whole rows to float64.

    X [a, n], Y [b, n], P [n] -> [a, b]; several Y are taken as one below the other, without
    joining them in memory. Long float32 rows are multiplied in blocks of 4096 whose sums are added
    in float64: the error is about 1e-8 of the product of the norms, where one float32 sum over
    10^8 entries may lose every digit. Short or float64 rows are exact to float64.

    >>> products(torch.ones(1, 3), torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0]))
    tensor([[6., 6.]], dtype=torch.float64)
    """
    parts = [Y] if isinstance(Y, torch.Tensor) else list(Y)
    size, chunk = X.shape[-1], _CHUNK.get(X.device.type, _CHUNK["other"])
    if size <= chunk:
        return _chunk(X, parts, P)
    total = X.new_zeros(len(X), sum(len(part) for part in parts), dtype=torch.float64)
    for start in range(0, size, chunk):
        here = slice(start, min(start + chunk, size))
        pieces = [part[:, here] for part in parts]
        total += _chunk(X[:, here], pieces, None if P is None else P[here])
    return total


def _chunk(X: torch.Tensor, Ys: list[torch.Tensor], P: torch.Tensor | None) -> torch.Tensor:
    size = X.shape[-1]
    exact = size <= _SMALL or any(t.dtype == torch.float64 for t in (X, *Ys))
    wide = torch.float64 if exact else torch.float32
    X, Ys = X.to(wide), [part.to(wide) for part in Ys]
    Y = Ys[0] if len(Ys) == 1 else torch.cat(Ys)
    if P is not None:
        Y = Y * P.to(wide)
    if exact:
        return X @ Y.mT
    whole = size // BLOCK * BLOCK
    left = X[:, :whole].reshape(len(X), -1, BLOCK).transpose(0, 1)
    right = Y[:, :whole].reshape(len(Y), -1, BLOCK).transpose(0, 1)
    # The few rows come first: BLAS reads the many then once, at the speed of memory.
    total = torch.bmm(right, left.mT).sum(0, dtype=torch.float64).mT
    if whole < size:
        total = total + X[:, whole:].double() @ Y[:, whole:].double().mT
    return total


def squared_norm(v: torch.Tensor, P: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``v^T diag(P) v`` in float64; v [n].

    >>> squared_norm(torch.tensor([3.0, 4.0]))
    tensor(25., dtype=torch.float64)
    """
    if P is not None:
        return products(v[None], v[None], P)[0, 0]
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    whole = len(v) // BLOCK * BLOCK
    lengths = torch.linalg.vector_norm(v[:whole].reshape(-1, BLOCK), dim=-1)
    rest: torch.Tensor = torch.linalg.vector_norm(v[whole:], dtype=torch.float64).square()
    rest += lengths.double().square().sum()
    return rest


def combine(X: torch.Tensor, weights: torch.Tensor, P: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``P * (X^T weights)``: one vector [n] from rows X [k, n] and coefficients [k].

    The result has the rows' dtype, at least float32.

    >>> combine(torch.eye(2), torch.tensor([2.0, 3.0]))
    tensor([2., 3.])
    """
    wide = torch.promote_types(X.dtype, torch.float32)
    combined = X.to(wide).mT @ weights.to(X.device, wide)
    return combined if P is None else combined * P.to(wide)


def summed(tensors: Sequence[torch.Tensor], group: Any | None) -> list[torch.Tensor]:
    """Add float64 tensors over the processes that hold the shards, with one message.

    Args:
        tensors: Partial sums, all on one device.
        group: The process group, or None for one process.
    """
    if group is None:
        return list(tensors)
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(packed, group=group)
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def average_(tensors: Sequence[torch.Tensor], group: Any | None) -> None:
    """Replace tensors by their mean over the processes; tensors that agree already stay."""
    if group is None:
        return
    count = torch.distributed.get_world_size(group)
    for tensor in tensors:
        torch.distributed.all_reduce(tensor, group=group)
        tensor.div_(count)
