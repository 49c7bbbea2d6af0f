"""Which single ``oft_block_size`` or ``r`` makes PEFT build given blocks in every module.

PEFT moves a setting that does not divide a layer's width to the nearest divisor, silently for the
config on disk; this is that rule's inverse. Integers only.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from orthomerge.errors import AdapterError

__all__ = ["adjusted_divisor", "common_setting"]


def adjusted_divisor(width: int, value: int) -> int:
    """Return what PEFT makes of a setting for a layer of ``width`` columns.

    The divisor of ``width`` nearest to ``value``, the lower one on a tie; ``width`` itself when
    the value is larger. Pinned against PEFT's own code by ``test_adjustment_is_pefts``.

    >>> adjusted_divisor(60, 32)
    30
    """
    return min(_divisors(width), key=lambda divisor: (abs(divisor - value), divisor))


def common_setting(sizes: Collection[tuple[int, int]]) -> tuple[str, int]:
    """Return the setting, ``oft_block_size`` or ``r``, that gives every layer its block size.

    Args:
        sizes: Pairs of a layer's columns n and its block size b, which divides n.

    Returns:
        The name and the value. A block size that needs no adjustment is preferred, then any
        block size, then the number of blocks.

    Raises:
        AdapterError: There is none.

    >>> common_setting({(64, 32), (60, 30)})
    ('oft_block_size', 32)
    """
    counts = [(width, width // size) for width, size in sizes]
    for name, pairs in (("oft_block_size", sizes), ("r", counts)):
        lows, highs = zip(*(_range(width, wanted) for width, wanted in pairs), strict=True)
        low, high = max(lows), min(highs)
        if low <= high:
            plain = [wanted for _, wanted in pairs if low <= wanted <= high]
            return name, max(plain) if plain else int(low)
    raise AdapterError(
        "no single oft_block_size or r describes these blocks, and PEFT has no setting per module",
        found=", ".join(f"{size} of {width} columns" for width, size in sorted(sizes)),
        remedy="Write full weights, or regroup to blocks of one size.",
    )


def _range(width: int, wanted: int) -> tuple[int, float]:
    """Return the least and the largest setting that ``adjusted_divisor`` takes to ``wanted``."""
    divisors = _divisors(width)
    place = divisors.index(wanted)
    low = (divisors[place - 1] + wanted) // 2 + 1 if place else 1
    last = place == len(divisors) - 1
    return low, math.inf if last else (wanted + divisors[place + 1]) // 2


def _divisors(width: int) -> list[int]:
    small = [number for number in range(1, math.isqrt(width) + 1) if width % number == 0]
    return sorted({*small, *(width // number for number in small)})
