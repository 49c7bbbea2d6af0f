"""Hyperspherical energy: how evenly the rows of a weight are spread over directions.

A measure only; every rotation of the inputs leaves it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import require_finite
from orthomerge.linalg.precision import full_precision

__all__ = ["EnergyReport", "hyperspherical_energy"]

_COINCIDENT = 1e-6
_CLOSE = 1e-4  # squared distance below which 2 - 2 cos has lost too many digits
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class EnergyReport:
    """The energy of one weight, and what it was taken over.

    Attributes:
        value: The sum over ordered pairs.
        rows: Rows that took part, after sampling.
        zero_rows: Rows of the whole weight that are zero, hence without a direction.
        coincident: Unordered pairs of the rows in question less than 1e-6 apart, left out.
    """

    value: float
    rows: int
    zero_rows: int
    coincident: int


@full_precision()
def hyperspherical_energy(
    W: torch.Tensor, *, max_rows: int | None = 2048, seed: int = 0
) -> EnergyReport:
    """Measure the hyperspherical energy of the rows of ``W``.

    ``HE(W) = sum_{i != j} 1 / ||w_i / |w_i| - w_j / |w_j| ||`` over ordered pairs; W [o, n].
    Zero rows and coincident pairs are left out and counted. In float64, through the Gram matrix
    in chunks; ``HE(W R) = HE(W)`` for every orthogonal R.

    Args:
        W: A weight, one neuron a row.
        max_rows: Take a sample of this many rows that are not zero; None takes all. The cost is
            its square times n.
        seed: Seed of the sample. The same rows are taken of equally shaped weights with the same
            zero rows, on every device.

    Returns:
        The energy, and what it was taken over.

    Raises:
        NumericalError: W is no matrix or not finite, or ``max_rows`` is below 2.

    References:
        Liu et al., "Learning towards Minimum Hyperspherical Energy", arXiv:1805.09298, s = 1.

    >>> hyperspherical_energy(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).value
    1.0
    """
    if W.ndim != 2 or (max_rows is not None and max_rows < 2):
        raise NumericalError(
            "the energy needs a matrix and a sample of at least two rows",
            found=f"shape {tuple(W.shape)}, max_rows {max_rows}",
        )
    X = require_finite(W, "the weight").double()
    # Scaled by the largest entry first, so that the squares of tiny rows do not vanish.
    largest = X.abs().amax(dim=-1) if X.shape[-1] else X.new_zeros(X.shape[0])
    found = (largest > 0).nonzero().flatten()
    zero_rows = W.shape[0] - found.numel()
    if max_rows is not None and found.numel() > max_rows:
        order = torch.randperm(found.numel(), generator=torch.Generator().manual_seed(seed))
        found = found[order[:max_rows].sort().values.to(found.device)]
    X = X[found] / largest[found, None]
    X = X / torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    value, coincident = 0.0, 0
    for start in range(0, X.shape[0], _CHUNK):
        part, left_out = _energy_of(X, start)
        value, coincident = value + 2 * part, coincident + left_out
    return EnergyReport(value, X.shape[0], zero_rows, coincident)


def _energy_of(X: torch.Tensor, start: int) -> tuple[float, int]:
    """Return the energy of the pairs (i, j > i) with i in the chunk, and how many coincide."""
    rows = X[start : start + _CHUNK]
    squares = 2 - 2 * (rows @ X[start:].mT)
    later = torch.ones_like(squares, dtype=torch.bool).triu(1)
    close_rows, close_columns = (later & (squares < _CLOSE)).nonzero(as_tuple=True)
    for first in range(0, close_rows.numel(), _CHUNK):
        i, j = (axis[first : first + _CHUNK] for axis in (close_rows, close_columns))
        squares[i, j] = (rows[i] - X[start + j]).square().sum(dim=-1)
    apart = later & (squares >= _COINCIDENT**2)
    energy = torch.where(apart, squares, 1.0).rsqrt().where(apart, 0.0).sum()
    return float(energy), int((later & ~apart).sum())
