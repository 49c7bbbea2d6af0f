"""Means of skew-symmetric matrices that keep the mean's size: the merge in the Lie algebra.

Which layers are merged, and what the matrices came from, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from orthomerge.errors import NumericalError, UnknownNameError
from orthomerge.linalg.checks import frobenius, require_finite
from orthomerge.linalg.precision import working_dtype

__all__ = ["AlgebraMerge", "AlgebraSum", "Correction", "merge_algebra"]

Correction = Literal["layer", "block", "none"]
_ROUNDING = 1e-13  # weights that sum to 1 this nearly are shares already


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


class AlgebraSum:
    """A weighted sum of skew-symmetric matrices that are seen one at a time.

    Holds ``S = sum_i w_i A_i`` and the norms ``||A_i||_F``; no input is kept. ``merged`` makes the
    magnitude-corrected mean of what was added so far, as ``merge_algebra`` describes it.

    >>> total = AlgebraSum()
    >>> total.add(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), 2.0)
    >>> total.merged()[0]
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._norms: list[torch.Tensor] = []
        self._weights: list[float] = []

    def add(self, A: torch.Tensor, weight: float = 1.0) -> None:
        """Add one matrix; A [nb, b, b] or [n, n], the same shape every time.

        Args:
            A: The matrix. Half precision is lifted to float32; it is not changed.
            weight: Its weight, not negative. The sum of all weights is divided out at the end.

        Raises:
            NumericalError: A bad weight, another shape, or a matrix that is not finite.
        """
        _check_weights([weight])
        X = require_finite(A.to(working_dtype(A)), "an input of the merge")
        if self._sum is None:
            self._sum = torch.zeros_like(X)
        elif self._sum.shape != X.shape:
            raise NumericalError(
                "the inputs of a merge differ in shape",
                expected=tuple(self._sum.shape),
                found=tuple(X.shape),
            )
        dtype = torch.promote_types(self._sum.dtype, X.dtype)
        self._sum = self._sum.to(dtype).add_(X.to(dtype), alpha=float(weight))
        self._norms.append(_block_norms(X[None])[0])
        self._weights.append(float(weight))

    def merged(
        self,
        strength: float = 1.0,
        correction: Correction = "layer",
        c_max: float = math.inf,
        zero_guard: float = 1e-6,
    ) -> tuple[torch.Tensor, AlgebraMerge]:
        """Return the corrected mean of what was added, and the numbers behind it.

        The arguments and errors are those of ``merge_algebra``; nothing added, or only with
        weight 0, is an error too. More can be added afterwards.
        """
        _check_correction(correction)
        _check_settings(strength, c_max, zero_guard)
        shares, total = _shares(self._weights)
        if self._sum is None:  # no weights either, which _shares has refused
            raise NumericalError("nothing was added to the sum")
        input_norms, sum_norms = torch.stack(self._norms), _block_norms(self._sum[None])[0] / total
        norms = torch.linalg.vector_norm(input_norms, dim=-1)
        sum_norm = torch.linalg.vector_norm(sum_norms)[None]
        by_layer = (norms[:, None], sum_norm)
        inputs, sums = (input_norms, sum_norms) if correction == "block" else by_layer
        if correction == "none":
            factors, zeroed, capped = torch.ones(1, dtype=torch.float64), 0, 0
        else:
            factors, zeroed, capped = _factors(inputs, sums, shares, c_max, zero_guard)
        merged = self._sum * _spread(strength * factors / total, self._sum)
        merged_norm = torch.linalg.vector_norm(_block_norms(merged[None]))
        found = tuple(factors.tolist()), tuple(norms.tolist()), float(sum_norm), float(merged_norm)
        return merged, AlgebraMerge(correction, *found, zeroed, capped)


def merge_algebra(
    As: torch.Tensor | Iterable[torch.Tensor],
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
        As: The T inputs, stacked, or anything that yields them one by one; then only the sum
            is held. Half precision is lifted to float32.
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
    _check_correction(correction)
    _check_settings(strength, c_max, zero_guard)
    shares = weight_shares(weights)
    total, count = AlgebraSum(), 0
    for count, A in enumerate(As, 1):
        if count <= len(shares):
            total.add(A, shares[count - 1])
    if count != len(shares):
        raise NumericalError("one weight per input is needed", expected=count, found=len(shares))
    return total.merged(strength, correction, c_max, zero_guard)


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


def weight_shares(weights: Sequence[float] | torch.Tensor, count: int | None = None) -> list[float]:
    """Return weights divided by their sum.

    Raises:
        NumericalError: They are not ``count``, not finite, negative, or all zero.
    """
    values = [float(weight) for weight in weights]
    if count is not None and len(values) != count:
        raise NumericalError("one weight per input is needed", expected=count, found=len(values))
    return _shares(values)[0]


def _shares(weights: Sequence[float]) -> tuple[list[float], float]:
    """Return the weights as shares of their sum, and the sum; shares are left as they are."""
    _check_weights(weights)
    total = math.fsum(weights)
    if total <= 0:
        raise NumericalError("weights must not all be zero", found=list(weights))
    if abs(total - 1) < _ROUNDING:
        return list(weights), 1.0
    return [weight / total for weight in weights], total


def _check_weights(weights: Sequence[float]) -> None:
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise NumericalError(
            "weights must be finite and not negative",
            found=list(weights),
            remedy="A norm-preserving mean has no negative weights; negate the input instead.",
        )


def _check_correction(correction: str) -> None:
    if correction not in get_args(Correction):
        raise UnknownNameError("correction", correction, get_args(Correction))


def _check_settings(strength: float, c_max: float, zero_guard: float) -> None:
    checks = (
        ("strength", strength, "a finite number", math.isfinite(strength)),
        ("c_max", c_max, "at least 1", c_max >= 1),
        ("zero_guard", zero_guard, "in [0, 1)", 0 <= zero_guard < 1),
    )
    for name, value, expected, right in checks:
        if not right:
            raise NumericalError(f"{name} is out of range", expected=expected, found=value)
