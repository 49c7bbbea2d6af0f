"""Means of skew-symmetric matrices that keep the mean's size: the merge in the Lie algebra.

Which layers are merged, and what the matrices came from, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from orthomerge.errors import NumericalError, UnknownNameError
from orthomerge.linalg.checks import frobenius, require_finite
from orthomerge.linalg.precision import working_dtype

__all__ = ["AlgebraMerge", "Correction", "merge_algebra"]

Correction = Literal["layer", "block", "none"]


@dataclass(frozen=True, slots=True)
class AlgebraMerge:
    """What one merge in the algebra did, in plain numbers.

    Attributes:
        correction: The granularity asked for.
        factors: The factors c, one for "layer" and "none", one per block for "block".
        norms: ``||A_i||_F`` of every input, over the whole layer.
        sum_norm: ``||S||_F`` with S the weighted mean, over the whole layer.
        merged_norm: ``||A_m||_F`` of the result, over the whole layer.
        zeroed: How many of the factors the zero guard set to 0.
        capped: How many of the factors ``c_max`` cut.
    """

    correction: str
    factors: tuple[float, ...]
    norms: tuple[float, ...]
    sum_norm: float
    merged_norm: float
    zeroed: int = 0
    capped: int = 0


def merge_algebra(
    As: torch.Tensor,
    weights: Sequence[float] | torch.Tensor,
    strength: float = 1.0,
    correction: Correction = "layer",
    c_max: float = math.inf,
    zero_guard: float = 1e-6,
) -> tuple[torch.Tensor, AlgebraMerge]:
    """Average skew-symmetric matrices without letting disagreement shrink the average.

    ``S = sum_i w_i A_i``, ``m = sum_i w_i ||A_i||_F``, ``A_m = g min(m / ||S||_F, c_max) S``, so
    that ``||A_m||_F = g m``: the rotation is as large as the inputs are on average.
    As [T, nb, b, b] or [T, n, n] -> [nb, b, b] or [n, n].

    Args:
        As: The T inputs, stacked. Half precision is lifted to float32.
        weights: T weights w_i >= 0, normalised to sum 1 here.
        strength: The factor g on the result.
        correction: Over what the norms are taken: "layer", one factor per call, as in the paper;
            "block", one per block; "none", c = 1, the plain mean.
        c_max: Largest factor, at least 1. The default is the paper's; finite values keep
            nearly cancelling inputs from becoming a full-size rotation made of noise.
        zero_guard: Where ``||S|| <= zero_guard m`` the direction is noise and the result is 0.
            Not used by "none", which divides by nothing.

    Returns:
        A_m in float32 or float64, and the numbers behind it.

    Raises:
        NumericalError: Bad weights or settings, or inputs that are not finite.
        UnknownNameError: ``correction`` is none of the three.

    References:
        OrthoMerge, arXiv:2602.05943, magnitude-corrected merging.

    >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> merge_algebra(torch.stack([A, 3 * A]), [1, 1])[1].factors
    (1.0,)
    """
    if correction not in get_args(Correction):
        raise UnknownNameError("correction", correction, get_args(Correction))
    _check_settings(strength, c_max, zero_guard)
    shares = _normalised(weights, As.shape[0])
    X = require_finite(As.to(working_dtype(As)), "an input of the merge")
    S = torch.zeros_like(X[0])
    for A, share in zip(X, shares, strict=True):
        S.add_(A, alpha=share)

    input_norms, sum_norms = _block_norms(X), _block_norms(S[None])[0]
    norms = torch.linalg.vector_norm(input_norms, dim=-1)
    sum_norm = torch.linalg.vector_norm(sum_norms)[None]
    inputs, sums = (input_norms, sum_norms) if correction == "block" else (norms[:, None], sum_norm)
    if correction == "none":
        factors, zeroed, capped = torch.ones(1, dtype=torch.float64), 0, 0
    else:
        factors, zeroed, capped = _factors(inputs, sums, shares, c_max, zero_guard)
    merged = S * _spread(strength * factors, S)
    merged_norm = torch.linalg.vector_norm(_block_norms(merged[None]))
    found = tuple(factors.tolist()), tuple(norms.tolist()), float(sum_norm), float(merged_norm)
    return merged, AlgebraMerge(correction, *found, zeroed, capped)


def _factors(
    inputs: torch.Tensor, sums: torch.Tensor, shares: list[float], c_max: float, zero_guard: float
) -> tuple[torch.Tensor, int, int]:
    """Return c for each group, and how many were zeroed and capped.

    inputs [T, groups] and sums [groups] are norms in float64; a group is a layer or a block.
    """
    means = torch.tensor(shares, dtype=torch.float64) @ inputs
    noise = sums <= zero_guard * means
    # At least 1 by the triangle inequality; rounding must not say otherwise.
    raw = (means / torch.where(noise, 1.0, sums)).clamp(min=1.0)
    factors = torch.where(noise, 0.0, raw.clamp(max=c_max))
    return factors, int(noise.sum()), int((~noise & (raw > c_max)).sum())


def _spread(factors: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """Shape the factors so that they multiply S as a whole, or block by block."""
    shape = (1,) * S.ndim if factors.numel() == 1 else (*S.shape[:-2], 1, 1)
    return factors.reshape(shape).to(S)


def _block_norms(X: torch.Tensor) -> torch.Tensor:
    """Return the norm of every block of every matrix; X [T, ..., b, b] -> [T, blocks]."""
    return frobenius(X).reshape(X.shape[0], -1).cpu()


def _normalised(weights: Sequence[float] | torch.Tensor, count: int) -> list[float]:
    values = [float(weight) for weight in weights]
    if len(values) != count:
        raise NumericalError("one weight per input is needed", expected=count, found=len(values))
    if not all(math.isfinite(value) and value >= 0 for value in values) or sum(values) <= 0:
        raise NumericalError(
            "weights must be finite, not negative, and not all zero",
            found=values,
            remedy="A norm-preserving mean has no negative weights; negate the input instead.",
        )
    total = math.fsum(values)
    return [value / total for value in values]


def _check_settings(strength: float, c_max: float, zero_guard: float) -> None:
    checks = (
        ("strength", strength, "a finite number", math.isfinite(strength)),
        ("c_max", c_max, "at least 1", c_max >= 1),
        ("zero_guard", zero_guard, "in [0, 1)", 0 <= zero_guard < 1),
    )
    for name, value, expected, right in checks:
        if not right:
            raise NumericalError(f"{name} is out of range", expected=expected, found=value)
