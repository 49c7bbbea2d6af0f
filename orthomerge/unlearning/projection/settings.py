"""Every setting of a projector in one place, checked together.

What the settings do is written where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from orthomerge.errors import OrthoMergeError, RecipeError, UnknownNameError, combined

__all__ = ["ProjectionSettings"]

_CHOICES = {
    "mode": ("hard", "cone", "conflict", "sign", "off"),
    "delta_mode": ("hard", "cone"),
    "stage": ("A", "B", "AB"),
    "metric": ("euclid", "adam", "fisher"),
    "delta_metric": ("euclid", "adam", "fisher"),
    "nan_policy": ("skip", "raise"),
}
_ROWS = ("batch", "bank", "history", "extra")
_GRANULARITIES = ("per-tensor", "per-layer", "global")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionSettings:
    """How a projector protects.

    Attributes:
        mode: Stage A: ``"hard"`` removes everything that moves a protected loss, ``"cone"`` what
            raises one, ``"conflict"`` is the cone with the window's row alone, ``"sign"`` the
            sign-aware rule for comparisons, ``"off"`` removes nothing.
        delta_mode: Stage B: ``"cone"`` keeps protected losses from rising, ``"hard"`` from moving,
            which also cancels what a retain term in the loss gained.
        stage: ``"A"`` on gradients, ``"B"`` on the update the optimizer realised (momentum,
            weight decay and clipping included), or both.
        metric: Preconditioner of stage A.
        delta_metric: Preconditioner of stage B.
        granularity: Which tensors share coefficients, see ``find_scope``. Per tensor is stricter
            than one set for all.
        rows: Kinds of protected rows: the window's retain gradient (``"batch"``), the bank, past
            windows (``"history"``), and rows given by ``add_rows`` (``"extra"``).
        bank_size: Most rows of the bank.
        refresh_every: Windows after which the bank is computed anew; a bank that is never
            refreshed harms.
        history: Past windows to keep.
        row_ema: Weight of the past in an exponential mean that takes the window's row's place.
        strength: Share of the tangent part that stage A removes.
        restore: Stage B demands ``g^T Delta <= -restore * (L - L_start)`` while the retain loss L
            is above what it was in the starting model; 0 turns it off.
        rtol: Eigenvalue cut-off; by default 1e-7, and 1e-3 for rows in half precision.
        row_dtype: Stored dtype of rows.
        row_device: ``"param"``, or a device to keep rows on, such as ``"cpu"``.
        nan_policy: ``"skip"`` leaves out a row, or the window, that is not finite; ``"raise"``
            refuses it.
        min_kept: Below this kept fraction the forget step is zero: what is left is noise.
        margin: GEM's bias of the cone in stage A.
        allow_approximate: Whether stage A alone may be used with momentum.
        clip_value: Elementwise clipping of the training loop. It turns a projected gradient into
            another direction, so any value but None is refused.

    Raises:
        RecipeError: A value or a combination is not valid; several are reported together.
    """

    mode: Literal["hard", "cone", "conflict", "sign", "off"] = "hard"
    delta_mode: Literal["hard", "cone"] = "cone"
    stage: Literal["A", "B", "AB"] = "AB"
    metric: Literal["euclid", "adam", "fisher"] = "euclid"
    delta_metric: Literal["euclid", "adam", "fisher"] = "euclid"
    granularity: str | Sequence[str] = "per-tensor"
    rows: Sequence[str] = _ROWS
    bank_size: int = 8
    refresh_every: int = 4
    history: int = 0
    row_ema: float | None = None
    strength: float = 1.0
    restore: float = 0.3
    rtol: float | None = None
    row_dtype: torch.dtype = torch.float32
    row_device: str = "param"
    nan_policy: Literal["skip", "raise"] = "skip"
    min_kept: float = 1e-3
    margin: float = 0.0
    allow_approximate: bool = False
    clip_value: float | None = None

    def __post_init__(self) -> None:
        problems = [*self._names(), *self._ranges(), *self._combinations()]
        if problems:
            raise combined(problems)

    @property
    def cutoff(self) -> float:
        """Return the eigenvalue cut-off in use."""
        if self.rtol is not None:
            return self.rtol
        return 1e-3 if self.row_dtype.itemsize == 2 else 1e-7

    @property
    def before_step(self) -> bool:
        """Return whether stage A removes anything."""
        return "A" in self.stage and self.mode != "off"

    @property
    def after_step(self) -> bool:
        """Return whether stage B corrects updates."""
        return "B" in self.stage

    def _names(self) -> Iterator[OrthoMergeError]:
        for setting, known in _CHOICES.items():
            if getattr(self, setting) not in known:
                yield UnknownNameError(setting, str(getattr(self, setting)), known)
        if isinstance(self.granularity, str) and self.granularity not in _GRANULARITIES:
            yield UnknownNameError("granularity", self.granularity, _GRANULARITIES)
        for kind in self.rows:
            if kind not in _ROWS:
                yield UnknownNameError("kind of rows", kind, _ROWS)

    def _ranges(self) -> Iterator[OrthoMergeError]:
        ranges = (
            ("bank_size", self.bank_size, 1, math.inf),
            ("refresh_every", self.refresh_every, 1, math.inf),
            ("history", self.history, 0, math.inf),
            ("strength", self.strength, 0.0, 1.0),
            ("restore", self.restore, 0.0, math.inf),
            ("min_kept", self.min_kept, 0.0, 1.0),
            ("margin", self.margin, 0.0, math.inf),
            ("rtol", self.cutoff, 0.0, 1.0),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                yield RecipeError(
                    f"{name} is out of range", expected=f"{low} to {high}", found=value
                )
        if self.row_ema is not None and not 0 <= self.row_ema < 1:
            yield RecipeError(
                "row_ema is out of range", expected="0 <= row_ema < 1", found=self.row_ema
            )
        if not self.row_dtype.is_floating_point:
            yield RecipeError("rows need a floating-point dtype", found=self.row_dtype)

    def _combinations(self) -> Iterator[OrthoMergeError]:
        if not self.rows:
            yield RecipeError("no kind of rows is protected", expected=", ".join(_ROWS))
        if self.history and "history" not in self.rows:
            yield RecipeError(
                "history has a length but is not among the rows",
                found=f"history={self.history}, rows={tuple(self.rows)}",
            )
        if self.mode == "conflict" and tuple(self.rows) != ("batch",):
            yield RecipeError(
                "the mode 'conflict' is the cone with one row",
                expected="rows=('batch',)",
                found=tuple(self.rows),
                remedy="Use the mode 'cone' for several rows.",
            )
        if self.margin and self.mode not in ("cone", "conflict"):
            yield RecipeError(
                "a margin needs one-sided constraints", expected="mode 'cone'", found=self.mode
            )
        if self.row_dtype.itemsize == 2 and self.cutoff < 1e-3:
            yield RecipeError(
                "rows in half precision do not resolve such a cut-off",
                expected="rtol of at least 1e-3",
                found=self.rtol,
            )
        if self.clip_value is not None:
            yield RecipeError(
                "elementwise clipping undoes the projection",
                expected="clip_value None",
                found=self.clip_value,
                remedy="Clip by the global norm: it keeps the direction.",
            )
