"""Exact selection by magnitude over data that is only seen in pieces.

Finds the k-th largest |x| of a tensor or a whole model without sorting or holding it: a sample
brackets the answer, one pass counts and collects what lies inside the bracket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch import Tensor

from orthomerge.errors import NumericalError

__all__ = ["ChunkedValues", "kth_largest_magnitude"]

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
    if not 1 <= k <= values.numel:
        raise ValueError(f"k = {k} is not between 1 and {values.numel}")
    low, high = _bracket(values.sample(_SAMPLE), k / values.numel)
    while True:
        above, inside = _count_and_collect(values, low, high)
        if above >= k:  # the answer is at `high` or beyond
            low, high = high, math.inf
        elif above + len(inside) < k and low > 0.0:  # the answer is below `low`
            low, high = 0.0, low
        elif above + len(inside) < k:
            raise NumericalError("values that are not numbers cannot be ranked")
        else:
            rank = len(inside) - (k - above)  # from the smallest, zero-based
            return float(np.partition(inside, rank)[rank])


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
    values: ChunkedValues, low: float, high: float
) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.floating]]]:
    """Count the magnitudes >= high and collect those in [low, high).

    numpy compares and compresses several times faster than torch does on the CPU.
    """
    above, inside = 0, []
    for chunk in values.chunks():
        magnitudes = chunk.abs().cpu().numpy()
        high_in_dtype, low_in_dtype = magnitudes.dtype.type(high), magnitudes.dtype.type(low)
        reach = magnitudes >= high_in_dtype
        above += int(np.count_nonzero(reach))
        inside.append(magnitudes[(magnitudes >= low_in_dtype) ^ reach])  # reach is the subset
    return above, np.concatenate(inside)
