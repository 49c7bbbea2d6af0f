"""A few numbers that tell one low-rank matrix from another, at the cost of reading its factors.

Unlike a norm they also change when rows or columns change places, or a sign turns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from orthomerge.linalg.factors import Factors
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["sketch"]

_PROBES = 4
_SEEDS = {"rows": 0x5EED, "columns": 0xFACE}


@full_precision()
def sketch(F: Factors) -> Tensor:
    """Return ``U^T B A V / 4`` [..., 4, 4] in float64, U [o, 4] and V [n, 4] of random signs.

    ``E ||sketch||_F^2 = ||B A||_F^2``, so two matrices whose sketches agree within a tolerance
    differ by about as much. The signs depend on the shape alone.

    Args:
        F: The matrix, or a batch.

    References:
        Johnson and Lindenstrauss, 1984; Achlioptas, 2003, for random signs.

    >>> F = Factors(torch.ones(3, 1), torch.ones(1, 2))
    >>> bool(torch.equal(sketch(F.scaled(2.0)), 2 * sketch(F)))
    True
    """
    dtype = working_dtype(F.B, F.A)
    U, V = (
        _signs(size, side).to(F.B.device, dtype) for size, side in zip(F.shape, _SEEDS, strict=True)
    )
    left, right = U.mT @ F.B.to(dtype), F.A.to(dtype) @ V
    return left.double() @ right.double() / _PROBES


@lru_cache(maxsize=64)
def _signs(size: int, side: str) -> Tensor:
    stream = torch.Generator().manual_seed(_SEEDS[side] + size)
    return torch.randint(0, 2, (size, _PROBES), generator=stream, dtype=torch.int8) * 2 - 1
