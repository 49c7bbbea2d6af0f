"""How many numbers a skew-symmetric block is stored in, and back.

Integer arithmetic only; imports no torch. The packing itself is in ``skew``.
"""

from __future__ import annotations

import math

from orthomerge.errors import NumericalError

__all__ = ["block_size", "packed_width"]


def packed_width(size: int) -> int:
    """Return the length of a packed skew block, ``b(b-1)/2`` for size ``b``.

    >>> packed_width(32)
    496
    """
    return size * (size - 1) // 2


def block_size(width: int) -> int:
    """Return the size ``b`` of the skew block that is packed into ``width`` numbers.

    ``b = (1 + sqrt(1 + 8p)) / 2``, the inverse of ``p = b(b-1)/2``.

    Args:
        width: Length p of the packed strict upper triangle; 0 is a block of size 1.

    Raises:
        NumericalError: No block size has this packed width.

    >>> block_size(496)
    32
    """
    size = (1 + math.isqrt(1 + 8 * width)) // 2 if width >= 0 else 0
    if width < 0 or packed_width(size) != width:
        raise NumericalError(
            "not the packed width of a square block",
            expected="b(b-1)/2 for an integer b",
            found=width,
            remedy="The tensor is no packed skew-symmetric matrix, or its last axis was cut.",
        )
    return size
