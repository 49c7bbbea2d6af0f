"""The nearest matrix of low rank, as two factors: randomised for large matrices, exact for small.

Singular triples by the smaller Gram matrix alone are in ``lowrank``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import require_finite
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["Truncation", "truncated_svd"]

_EXACT_SIZE = 256  # up to this many rows or columns a full decomposition is cheap
_OVERSAMPLING = 16
_MOST_ITERATIONS = 12
_SETTLED = 1e-4  # relative change of the error at which iterating ends


@dataclass(frozen=True, slots=True)
class Truncation:
    """A low-rank approximation ``B A`` of a matrix.

    Attributes:
        B: Left factor [o, r].
        A: Right factor [r, n].
        values: The kept singular values in fp64, descending.
        error: ``||D - B A||_F``, measured.
        iterations: Power iterations that were used; 0 for a full decomposition.
    """

    B: Tensor
    A: Tensor
    values: Tensor
    error: float
    iterations: int

    @property
    def rank(self) -> int:
        """Number of kept singular triples."""
        return len(self.values)


@full_precision()
def truncated_svd(
    D: Tensor, rank: int | None, *, energy: float | None = None, floor: float = 0.0, seed: int = 0
) -> Truncation:
    """Return the best approximation of a matrix by one of rank r, split evenly over two factors.

    ``D ≈ B A`` with ``B = U sqrt(S)``, ``A = sqrt(S) V^T``; D [o, n], B [o, r], A [r, n]. Large
    matrices are sketched with ``rank + 16`` Gaussian columns and iterated,
    ``Q <- orth(D orth(D^T Q))``, until the error changes by less than 1e-4 of itself.

    Args:
        D: A matrix.
        rank: Largest r; None for any.
        energy: Smallest r that keeps this share of ``||D||_F^2``, at most ``rank``; None takes
            ``rank`` itself.
        floor: Singular values up to here are noise and never kept.
        seed: Of the sketch; the same seed gives the same factors.

    Returns:
        The factors, of D's dtype, at least float32; r is 0 when all is below the floor.

    Raises:
        NumericalError: D is not finite, or rank or energy is out of range.

    References:
        Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4.

    >>> truncated_svd(torch.diag(torch.tensor([3.0, 4.0])), 1).error
    3.0
    """
    _check(D, rank, energy)
    X = require_finite(D.to(working_dtype(D)), "the matrix")
    smaller = min(X.shape)
    most = smaller if rank is None else min(rank, smaller)
    width = most + _OVERSAMPLING
    if smaller <= _EXACT_SIZE or 2 * width >= smaller:
        U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
        iterations = 0
    else:
        U, s, Vh, iterations = _sketched(X, most, width, seed)
    kept = _rank(s, most, energy, floor, _squares(X))
    root = s[:kept].sqrt()
    B, A = (U[:, :kept] * root).to(X.dtype), (root[:, None] * Vh[:kept]).to(X.dtype)
    return Truncation(B, A, s[:kept], _squares(X - B @ A) ** 0.5, iterations)


def _sketched(X: Tensor, most: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(X.shape[1], width, generator=generator, dtype=X.dtype).to(X.device)
    Q = torch.linalg.qr(X @ sketch).Q
    total, before = _squares(X), float("inf")
    iterations = 0
    for iterations in range(1, _MOST_ITERATIONS + 1):
        Z = torch.linalg.qr(X.mT @ Q).Q
        Y = X @ Z
        s = torch.linalg.svdvals(Y.double())
        Q = torch.linalg.qr(Y).Q
        after = max(total - float(s[:most].square().sum()), 0.0)
        if abs(before - after) <= _SETTLED * after or after <= 1e-12 * total:
            break
        before = after
    U, s, Vh = torch.linalg.svd((Q.mT @ X).double(), full_matrices=False)
    return Q.double() @ U, s, Vh, iterations


def _rank(s: Tensor, most: int, energy: float | None, floor: float, total: float) -> int:
    above = int((s > floor).sum())
    if energy is not None and total > 0:
        reached = s.square().cumsum(0) >= (energy - 1e-12) * total
        above = min(above, int(reached.int().argmax()) + 1 if bool(reached.any()) else len(s))
    return min(most, above)


def _squares(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X, dtype=torch.float64)) ** 2


def _check(D: Tensor, rank: int | None, energy: float | None) -> None:
    if D.dim() != 2:
        raise NumericalError("low rank is a matter of matrices", found=list(D.shape))
    if rank is not None and rank < 1:
        raise NumericalError("the rank must be at least 1", found=rank)
    if energy is not None and not 0 < energy <= 1:
        raise NumericalError("the energy is a share", expected="in (0, 1]", found=energy)
