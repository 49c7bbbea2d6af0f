"""Merge skew-symmetric matrices plane by plane, with the planes of all of them made orthogonal.

The same idea as TSV-M for rotations; what it needs to know of the models is only their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import frobenius, require_finite
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["PlanesReport", "merge_planes", "plane_count"]


@dataclass(frozen=True, slots=True)
class PlanesReport:
    """What one merge of planes did, in plain numbers.

    Attributes:
        planes: Planes asked of every input and block.
        kept: Share of ``||A_i||_F^2`` in the kept planes, for every input; 1 for a zero input.
        empty: Kept planes, over all inputs and blocks, that do not turn (or have weight 0).
        dependent: Directions of the stacked frames, over all blocks, that the others contain; 0
            when no two inputs share one. A stack wider than the block always has some.
        merged_norm: ``||A_m||_F`` of the result.
    """

    planes: int
    kept: tuple[float, ...]
    empty: int
    dependent: int
    merged_norm: float


def plane_count(block: int, models: int) -> int:
    """Return how many planes each of the models may keep in a block: ``floor(b / 2T)``, not 0.

    Args:
        block: Block size b.
        models: Number of models T.

    Raises:
        NumericalError: A number is below 1.

    >>> plane_count(32, 3)
    5
    """
    if block < 1 or models < 1:
        raise NumericalError("no block or no models", found=f"block {block}, {models} models")
    return max(1, block // (2 * models))


@full_precision()
def merge_planes(
    As: torch.Tensor,
    weights: Sequence[float] | None = None,
    *,
    planes: int | None = None,
    strength: float = 1.0,
) -> tuple[torch.Tensor, PlanesReport]:
    """Sum the largest rotation planes of skew matrices after making them orthogonal.

    ``A_i = sum_j theta_ij (u v^T - v u^T)``. The frames (u, v) of the k largest planes of every
    input are stacked into ``U`` and replaced by the polar factor ``P`` of U, the nearest frame
    with orthonormal columns; ``A_m = s P blkdiag(w_i theta_ij J) P^T`` with
    ``J = [[0, 1], [-1, 0]]``. As [T, ..., b, b] -> [..., b, b].

    So A_m is skew by construction, its planes are orthogonal and their rotations commute, and
    inputs that turn different (orthogonal) planes are summed exactly. One input with all its
    planes comes back. A stack with 2 k T > b has more columns than directions: P is then the
    partial isometry, its rows orthonormal, and planes are no longer independent. Directions of
    the stack that are contained in the others within rounding stay out of P, so that a plane
    shared by two inputs gets the mean of their angles. Where theta is tied across the cut after
    k planes, which of the tied ones are kept is arbitrary.

    Args:
        As: The T inputs, skew-symmetric. Half precision is lifted to float32.
        weights: T finite factors on the angles, 1 by default: a sum, not a mean.
        planes: Planes k of each input and block; by default ``plane_count(b, T)``.
        strength: The factor s on the result.

    Returns:
        A_m, exactly skew-symmetric, in float32 or float64, and the numbers behind it.

    Raises:
        NumericalError: More planes than the block has, bad weights or strength, or inputs that
            are not finite.

    References:
        TSV-M, arXiv:2412.00081, whose factors this applies to so(n).

    >>> A = torch.zeros(2, 4, 4)
    >>> A[0, 0, 1], A[0, 1, 0], A[1, 2, 3], A[1, 3, 2] = 0.5, -0.5, 0.25, -0.25
    >>> torch.allclose(merge_planes(A)[0], A[0] + A[1])
    True
    """
    count, size = As.shape[0], As.shape[-1]
    kept = _planes_to_keep(planes, size, count)
    factors = _factors(weights, count, strength).to(As.device)
    X = require_finite(As, "an input of the merge").double()
    U, V, theta = _largest_planes((X - X.mT) / 2, kept)
    weighted = theta * factors.reshape(-1, *[1] * (theta.ndim - 1))
    turning = (weighted != 0).to(U)[..., None, :]
    frames = torch.cat([_side_by_side(U * turning), _side_by_side(V * turning)], dim=-1)
    resolution = 16 * size * torch.finfo(working_dtype(As)).eps
    P, dependent = _partial_isometry(frames, resolution)
    left, right = P.tensor_split(2, dim=-1)
    half = (left * (strength * _side_by_side(weighted[..., None, :]))) @ right.mT
    merged = (half - half.mT).to(working_dtype(As))
    empty = int((weighted == 0).sum())
    norm = float(torch.linalg.vector_norm(frobenius(merged)))
    return merged, PlanesReport(kept, _kept_shares(X, theta), empty, dependent - 2 * empty, norm)


def _planes_to_keep(planes: int | None, size: int, count: int) -> int:
    if planes is None:
        return min(plane_count(size, count), size // 2)
    if not 1 <= planes <= size // 2:
        raise NumericalError(
            f"a block of {size} has no {planes} planes", expected=f"1 to {size // 2}", found=planes
        )
    return planes


def _largest_planes(
    X: torch.Tensor, planes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return u, v [..., b, planes] and theta [..., planes] of the largest planes of skew X.

    ``i X`` is Hermitian with eigenvalues +-theta. The eigenvectors q of theta > 0 are orthonormal
    to each other and to their conjugates, tied or not, so that ``u = sqrt2 Re q`` and
    ``v = -sqrt2 Im q`` are real orthonormal pairs with ``X v = theta u``, ``X u = -theta v``.
    """
    theta, Q = torch.linalg.eigh(1j * X)
    theta, Q = theta.flip(-1)[..., :planes], Q.flip(-1)[..., :planes]
    noise = 4 * X.shape[-1] * torch.finfo(X.dtype).eps * theta[..., :1]
    theta = torch.where(theta > noise.clamp(min=0), theta, 0.0)
    return math.sqrt(2) * Q.real, -math.sqrt(2) * Q.imag, theta


def _side_by_side(X: torch.Tensor) -> torch.Tensor:
    """Join the columns of all inputs; [T, ..., m, k] -> [..., m, T k]."""
    return X.movedim(0, -2).flatten(-2)


def _partial_isometry(U: torch.Tensor, resolution: float) -> tuple[torch.Tensor, int]:
    """Return the polar factor of U on the directions it resolves, and how many it does not."""
    if U.numel() == 0:
        return U, 0
    left, values, right = torch.linalg.svd(U, full_matrices=False)
    resolved = values > resolution
    missing = resolved.numel() // resolved.shape[-1] * U.shape[-1] - int(resolved.sum())
    return (left * resolved[..., None, :]) @ right, missing


def _factors(weights: Sequence[float] | None, count: int, strength: float) -> torch.Tensor:
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count:
        raise NumericalError("one weight per input is needed", expected=count, found=len(values))
    if not all(math.isfinite(value) for value in (*values, strength)):
        raise NumericalError(
            "weights and strength must be finite", found=f"{values}, strength {strength}"
        )
    return torch.tensor(values, dtype=torch.float64)


def _kept_shares(X: torch.Tensor, theta: torch.Tensor) -> tuple[float, ...]:
    totals = frobenius(X).reshape(X.shape[0], -1).square().sum(-1)
    kept = 2 * theta.reshape(X.shape[0], -1).square().sum(-1)
    return tuple(torch.where(totals > 0, kept / totals, 1.0).tolist())
