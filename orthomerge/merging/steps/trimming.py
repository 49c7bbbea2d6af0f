"""Keep the entries of largest magnitude: the threshold of each model, and the cut itself.

The exact selection behind the thresholds is in ``linalg.selection``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.streams import TensorStream

__all__ = ["magnitude_thresholds", "trim"]


def magnitude_thresholds(
    streams: Sequence[TensorStream], *, density: float, **_: Any
) -> list[float]:
    """Return each model's k-th largest magnitude, k = ⌊density · numel⌋, at least 1.

    The survey of the methods that trim.
    """
    from orthomerge.linalg.selection import kth_largest_magnitudes

    if density == 1.0:
        return [0.0] * len(streams)
    counts = [max(1, math.floor(density * stream.numel + 1e-9)) for stream in streams]
    return kth_largest_magnitudes(streams, counts)


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Return a new tensor: delta with entries of magnitude below the threshold set to zero.

    >>> import torch
    >>> trim(torch.tensor([1.0, -3.0, 2.0]), 2.0)
    tensor([ 0., -3.,  2.])
    """
    import torch

    if threshold == 0.0:
        return delta.clone()
    edge = torch.tensor(threshold, dtype=delta.dtype)
    below = torch.nextafter(edge, torch.zeros_like(edge)).item()
    # hardshrink keeps |x| > below, i.e. |x| >= threshold, several times faster than torch.where
    return torch.nn.functional.hardshrink(delta, below)
