"""What one window of projection did, in plain numbers that go into a log as they are.

No tensor is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = ["ProjectionStats"]


@dataclass(frozen=True, slots=True)
class ProjectionStats:
    """Numbers of one window. What was not measured is None.

    Attributes:
        window: Number of the window, from 0.
        stage: ``"A"`` on gradients, ``"B"`` on the realised update, ``"AB"`` or ``"off"``.
        k: Protected rows in use.
        rank: Mean effective rank over the groups of tensors.
        condition: Largest condition number of a normalised Gram matrix.
        kept: ``||g_perp|| / ||g_f||`` of stage A: the sine of the angle to the protected span.
        cos_forget_retain: Cosine of the forget and the window's retain gradient, before A.
        residual: Largest |cosine| (hard) or forbidden cosine (cone) of a row with the corrected
            gradient, over rows and groups, measured again after A on what was written.
        slope: Product of the retain gradient with the gradient handed to the optimizer: plain
            gradient descent with rate lr changes the retain loss by ``-lr * slope``.
        cos_before: Cosine of the retain gradient with the proposed update, before B.
        cos_after: The same after B, read again from the stored parameters.
        residual_after: Like ``residual``, for the update after B.
        predicted: First-order change of the retain loss by the realised update.
        restoring: Decrease that the restore rule asked of the realised update.
        correction: ``||corrected - proposed|| / ||proposed||`` of B.
        quantised_zero: Share of entries with a corrected update that half-precision storage
            rounded to nothing; None for float32 parameters.
        step_scale: Scale kept by the finite-step filter; 1 without it.
        outside: Share of the squared retain gradient in trained parameters out of scope.
        refreshed: Whether the bank was computed anew in this window.
        flags: What was unusual, e.g. ``"zero_row"``, ``"collinear"``, ``"skipped_window"``.
        milliseconds: Time of the algebra, without the bank's backward passes.
        bank_milliseconds: Time of the bank's forward and backward passes.
        bytes: Memory of rows and snapshot on this process.
    """

    window: int = 0
    stage: str = "off"
    k: int = 0
    rank: float = 0.0
    condition: float = 1.0
    kept: float | None = None
    cos_forget_retain: float | None = None
    residual: float | None = None
    slope: float | None = None
    cos_before: float | None = None
    cos_after: float | None = None
    residual_after: float | None = None
    predicted: float | None = None
    restoring: float = 0.0
    correction: float | None = None
    quantised_zero: float | None = None
    step_scale: float = 1.0
    outside: float = 0.0
    refreshed: bool = False
    flags: tuple[str, ...] = ()
    milliseconds: float = 0.0
    bank_milliseconds: float = 0.0
    bytes: int = 0

    def flagged(self, *names: str, **changes: Any) -> ProjectionStats:
        """Return a copy with more flags, each once, and other changed values."""
        flags = tuple(dict.fromkeys((*self.flags, *names)))
        return replace(self, flags=flags, **changes)

    def as_dict(self) -> dict[str, object]:
        """Return everything under its name, ready for ``json.dumps``; numbers are finite or None.

        >>> ProjectionStats(window=3, flags=("zero_row",)).as_dict()["flags"]
        ['zero_row']
        """
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
