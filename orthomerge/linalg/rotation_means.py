"""The intrinsic (Karcher) mean of rotations.

Only rotations are averaged here; ``aligned_means`` averages weights that differ by rotations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import frobenius
from orthomerge.linalg.logarithms import exp_so, log_so
from orthomerge.linalg.means import weight_shares
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["KarcherReport", "karcher_mean"]


@dataclass(frozen=True, slots=True)
class KarcherReport:
    """How the search for a mean of rotations ended.

    Attributes:
        iterations: Steps taken.
        residual: Largest ``||sum_i w_i log(R^T R_i)||_F / sqrt(n)`` of the batch at the result.
        converged: Whether the residual is within the tolerance.
        spread: Largest ``||log(R^T R_i)||_F / sqrt(2)``, the distance of an input from the mean;
            for one plane its angle. The mean is unique when this is below pi/2.
    """

    iterations: int
    residual: float
    converged: bool
    spread: float


@full_precision()
def karcher_mean(
    Rs: torch.Tensor,
    weights: Sequence[float] | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 50,
) -> tuple[torch.Tensor, KarcherReport]:
    """Find the rotation with the least weighted sum of squared distances to the given ones.

    ``R = argmin sum_i w_i ||log(R^T R_i)||_F^2``, by ``R <- R exp(sum_i w_i log(R^T R_i))`` from
    the chordal mean, the polar factor of ``sum_i w_i R_i``. Rs [T, ..., n, n] -> [..., n, n]. The
    mean of two is the point w_2 of the way along the geodesic; the mean is the same seen from any
    frame: ``mean(P R_i Q) = P mean(R_i) Q``, ``mean(R_i^T) = mean(R_i)^T``.

    Args:
        Rs: The T rotations, stacked.
        weights: T weights >= 0, normalised to sum 1 here; equal by default.
        tolerance: Largest residual of a converged mean.
        max_iterations: Most steps to take; then the report says ``converged=False``.

    Returns:
        The mean in float32 or float64, and how it was found.

    Raises:
        NumericalError: An input is half a turn away from the mean sought, so that there is no
            unique one; or an input is no rotation; or bad weights.

    References:
        Karcher (1977); Manton, "A globally convergent numerical algorithm for computing the
        centre of mass on compact Lie groups" (2004).

    >>> R = exp_so(torch.tensor([[[0.0, 0.2], [-0.2, 0.0]], [[0.0, 0.6], [-0.6, 0.0]]]))
    >>> log_so(karcher_mean(R)[0])
    tensor([[ 0.0000,  0.4000],
            [-0.4000,  0.0000]])
    """
    shares = weight_shares([1.0] * Rs.shape[0] if weights is None else weights, Rs.shape[0])
    used = [i for i, share in enumerate(shares) if share > 0]
    X, shares = Rs[used].double(), [shares[i] for i in used]
    R = _chordal_mean(X, shares)
    for iteration in range(max_iterations + 1):
        G, spread = _mean_log(R, X, shares)
        residual = _largest(frobenius(G)) / math.sqrt(max(Rs.shape[-1], 1))
        if residual <= tolerance or iteration == max_iterations:
            break
        R = R @ exp_so(G)
    report = KarcherReport(iteration, residual, residual <= tolerance, spread)
    return R.to(working_dtype(Rs)), report


def _mean_log(R: torch.Tensor, X: torch.Tensor, shares: list[float]) -> tuple[torch.Tensor, float]:
    """Return ``sum_i w_i log(R^T R_i)`` and the largest distance from R."""
    G, spread = torch.zeros_like(R), 0.0
    for rotation, share in zip(X, shares, strict=True):
        try:
            L = log_so(R.mT @ rotation)
        except NumericalError as error:
            raise NumericalError(
                "the rotations have no unique mean, or one of them is no rotation",
                found=error.problem,
                remedy="Interpolate them towards the identity first.",
            ) from error
        G.add_(L, alpha=share)
        spread = max(spread, _largest(frobenius(L)) / math.sqrt(2))
    return G, spread


def _chordal_mean(X: torch.Tensor, shares: list[float]) -> torch.Tensor:
    """Return the rotation nearest to the weighted average, in the Frobenius norm."""
    factors = torch.tensor(shares, dtype=X.dtype, device=X.device)
    U, _, Vh = torch.linalg.svd(torch.tensordot(factors, X, dims=1))
    if U.shape[-1]:  # keep the determinant at 1 where the average says otherwise
        U[..., :, -1] *= torch.linalg.slogdet(U @ Vh).sign[..., None]
    R: torch.Tensor = U @ Vh
    return R


def _largest(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
