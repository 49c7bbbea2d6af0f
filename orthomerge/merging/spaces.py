"""The spaces a merge method can work in: what one model contributes to one weight.

Only names and explanations live here; how a source is brought into a space is in ``executors``.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["Space"]


class Space(Enum):
    """What one model's contribution to one weight is."""

    WEIGHT = "weight"
    """The weight itself, W_i; no base is needed."""

    DELTA = "delta"
    """The task vector D_i = W_i - W_0; the method also sees W_0."""

    ROTATION = "rotation"
    """Canonical skew blocks A_i with W_i = W_0 · Cayley(A_i), from OFT adapters."""

    FACTORS = "factors"
    """Low-rank factors (B_i, A_i) with the scale folded in, D_i = B_i A_i, from LoRA adapters."""
