"""Whether matrices differ by a rotation at all, and their mean where they do.

Shared by the methods that decide this layer by layer; the geometry is ``linalg``'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthomerge.linalg import procrustes_right, residual_noise_baseline, rotational_limit
from orthomerge.linalg.aligned_means import ProcrustesMeanReport, procrustes_mean

__all__ = ["pairwise_rotational", "residual_over_noise", "spanned_mean"]


def residual_over_noise(
    residual: float, change: float, shape: Sequence[int], block: int | None, margin: float
) -> tuple[float, bool]:
    """Return what a fitted rotation leaves of a change, and whether that is a rotation's.

    ``(‖X - W R‖ / ‖X - W‖) / b`` with b the residual fraction of isotropic noise: 0 for a pure
    rotation, about 1 for noise, above 1 for a change that rotation explains less than noise. It
    is a rotation's below ``linalg.rotational_limit``.
    """
    rows, columns = shape
    noise_level = residual_noise_baseline(rows, block or columns)
    found = residual / (change * noise_level)
    return found, found < rotational_limit(noise_level, rows * columns, margin)


def pairwise_rotational(
    matrices: Sequence[Tensor], margin: float, settings: dict[str, Any]
) -> tuple[bool, float | None]:
    """Return whether some pair differs by a rotation, and the least ``residual_over_noise``."""
    smallest, rotational = math.inf, False
    shape, block = matrices[0].shape, settings["block"]
    for first, second in itertools.combinations(matrices, 2):
        change = float(torch.linalg.vector_norm(second - first))
        if change and bool(first.any()) and bool(second.any()):
            fit = procrustes_right(first, second, **settings)
            found, below = residual_over_noise(fit.residual, change, shape, block, margin)
            smallest, rotational = min(smallest, found), rotational or below
    return rotational, smallest if math.isfinite(smallest) else None


def spanned_mean(
    matrices: Sequence[Tensor], shares: Sequence[float], settings: dict[str, Any]
) -> tuple[Tensor, ProcrustesMeanReport]:
    """Return the aligned mean; where the rows of all span less than the space, work in their span.

    Every fit leaves what is orthogonal to all rows at the identity, so this is exact.
    """
    rows, columns = matrices[0].shape
    spanned = rows * len(matrices)
    if settings["block"] is not None or spanned >= columns:
        return procrustes_mean(matrices, shares, **settings)
    stacked = torch.cat([matrix.double() for matrix in matrices])
    frame = torch.linalg.qr(stacked.mT).Q
    # The anchor is relative to the mean energy per input direction: of all, not of the span.
    anchor = settings["anchor"] * spanned / columns
    small = [matrix.double() @ frame for matrix in matrices]
    merged, report = procrustes_mean(small, shares, anchor=anchor)
    return merged @ frame.mT, report
