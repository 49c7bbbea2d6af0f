"""Exact selection by magnitude over data that is only seen in pieces.

Finds the k-th largest |x| of a tensor or a whole model without sorting or holding it: a sample
brackets the answer, one pass counts and collects what lies inside the bracket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from orthomerge.errors import NumericalError

__all__ = ["ChunkedValues", "kth_largest_magnitude", "kth_largest_magnitudes"]

_Magnitudes = np.ndarray[tuple[int], np.dtype[np.floating]]

_SAMPLE = 1 << 15
_MARGIN_SIGMAS = 6.0
_MARGIN_FLOOR = 0.004  # samples are blocks of neighbours, less informative than independent draws


class ChunkedValues(Protocol):
    """Values that can be walked through repeatedly, in flat pieces."""

    @property
    def numel(self) -> int:
        """Number of values."""

    def chunks(self) -> Iterator[Tensor]:
        """Yield all values, once, as flat tensors."""

    def sample(self, count: int) -> Tensor:
        """Return about ``count`` values spread evenly over the whole."""


def kth_largest_magnitude(values: ChunkedValues, k: int) -> float:
    """Return the k-th largest magnitude among all values, exactly.

    Args:
        values: What to select from; walked through once in most cases.
        k: Rank, 1 for the largest.

    Returns:
        The magnitude as a Python float; at least k values reach it.

    Raises:
        ValueError: k is not between 1 and the number of values.
        NumericalError: Some values are NaN.

    Example:
        >>> class Values:
        ...     numel = 4
        ...     def chunks(self): yield torch.tensor([1.0, -4.0]); yield torch.tensor([3.0, 2.0])
        ...     def sample(self, count): return torch.tensor([1.0, 3.0])
        >>> kth_largest_magnitude(Values(), 2)
        3.0
    """
    return kth_largest_magnitudes([values], [k])[0]


def kth_largest_magnitudes(values: Sequence[ChunkedValues], ks: Sequence[int]) -> list[float]:
    """Return what ``kth_largest_magnitude`` does, for several sets of values of one size.

    They are walked through in step, chunk by chunk, so that what they are made from in common (a
    base model) is read once.

    Raises:
        ValueError: A k is not between 1 and the number of values.
        NumericalError: Some values are NaN.
    """
    for each, k in zip(values, ks, strict=True):
        if not 1 <= k <= each.numel:
            raise ValueError(f"k = {k} is not between 1 and {each.numel}")
    brackets = [_bracket(v.sample(_SAMPLE), k / v.numel) for v, k in zip(values, ks, strict=True)]
    found = _count_and_collect(values, brackets)
    entries = zip(values, ks, brackets, found, strict=True)
    return [_settle(each, k, *bracket, *counted) for each, k, bracket, counted in entries]


def _settle(
    values: ChunkedValues, k: int, low: float, high: float, above: int, inside: _Magnitudes
) -> float:
    """Return the k-th largest magnitude; look again where the bracket does not hold it."""
    while True:
        if above >= k:  # the answer is at `high` or beyond
            low, high = high, math.inf
        elif above + len(inside) < k and low > 0.0:  # the answer is below `low`
            low, high = 0.0, low
        elif above + len(inside) < k:
            raise NumericalError("values that are not numbers cannot be ranked")
        else:
            rank = len(inside) - (k - above)  # from the smallest, zero-based
            return float(np.partition(inside, rank)[rank])
        [(above, inside)] = _count_and_collect([values], [(low, high)])


def _bracket(sample: Tensor, fraction: float) -> tuple[float, float]:
    """Return magnitudes between which the wanted one lies with high probability."""
    ordered = np.sort(sample.abs().cpu().numpy())
    size = len(ordered)
    sigma = math.sqrt(fraction * (1 - fraction) / size)
    margin = max(_MARGIN_SIGMAS * sigma, _MARGIN_FLOOR)
    low = math.floor((1 - fraction - margin) * size)
    high = math.ceil((1 - fraction + margin) * size)
    # The upper end belongs to the bracket: 16-bit weights have many equal differences, and the
    # wanted one is often equal to it.
    above_high = np.nextafter(ordered[high], np.inf) if high < size else math.inf
    return float(ordered[low]) if low >= 0 else 0.0, float(above_high)


def _count_and_collect(
    values: Sequence[ChunkedValues], brackets: Sequence[tuple[float, float]]
) -> list[tuple[int, _Magnitudes]]:
    """Count, for each set of values, those of magnitude >= high; collect those in [low, high).

    numpy compares and compresses several times faster than torch does on the CPU.
    """
    above = [0] * len(values)
    inside: list[list[_Magnitudes]] = [[] for _ in values]
    for chunks in zip(*(each.chunks() for each in values), strict=True):
        for at, (chunk, (low, high)) in enumerate(zip(chunks, brackets, strict=True)):
            magnitudes = chunk.abs().cpu().numpy()
            reach = magnitudes >= magnitudes.dtype.type(high)
            above[at] += int(np.count_nonzero(reach))
            reach ^= magnitudes >= magnitudes.dtype.type(low)  # what reaches low, but not high
            inside[at].append(magnitudes[np.flatnonzero(reach)])  # faster than by a mask
    return [(count, np.concatenate(found)) for count, found in zip(above, inside, strict=True)]
