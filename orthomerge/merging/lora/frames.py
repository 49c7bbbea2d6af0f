"""The coordinates that low-rank changes can be merged in: their names and sizes, no arithmetic.

What they are made of is in ``lifting``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from orthomerge.merging.registry import MergeMethod

__all__ = ["Lift", "coordinate_shape", "lift_of"]

Lift = Literal["knots", "knots-rows", "core"]


def lift_of(method: MergeMethod, parameters: Mapping[str, Any]) -> Lift:
    """Return in which coordinates a method, or the one nested in it, merges low-rank changes."""
    return "knots" if method.lift is None else method.lift(parameters)


def coordinate_shape(rows: int, columns: int, rank: int, space: Lift) -> tuple[int, int]:
    """Return the largest shape that one model's coordinates of a module can have.

    Args:
        rows: o.
        columns: n.
        rank: Σ r_i.
        space: Which coordinates.

    >>> coordinate_shape(8, 6, 4, "knots"), coordinate_shape(8, 6, 4, "core")
    ((4, 6), (4, 4))
    """
    left, right = min(rank, rows), min(rank, columns)
    return {"knots": (left, columns), "knots-rows": (right, rows), "core": (left, right)}[space]
