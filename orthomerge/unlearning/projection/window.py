"""Which stored row means what: the window's own, its smoothed one, the bank's, past and extra ones.

Collects and rotates rows; it neither projects nor steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from orthomerge.errors import RecipeError
from orthomerge.unlearning.projection.bank import Bank
from orthomerge.unlearning.projection.rows import Rows
from orthomerge.unlearning.projection.scopes import Scope
from orthomerge.unlearning.projection.settings import ProjectionSettings

__all__ = ["Window"]

_TINY = 1e-8  # of the median norm: below it a row is rounding noise, not a direction
_SQUARE_UNDERFLOW = 1e-30  # squared norms below it have lost digits in float32
_REMEMBERED = 32  # norms of past windows for the median


class Window:
    """Rows of the current optimizer window and what stays from earlier ones.

    Args:
        scope: Protected parameters and the other trained ones.
        settings: Kinds of rows, lengths, dtype and place.
        group: Processes holding the other shards, or None.
    """

    def __init__(self, scope: Scope, settings: ProjectionSettings, group: Any | None) -> None:
        self._scope, self._settings = scope, settings
        options = (settings.row_dtype, settings.row_device, group)
        self.rows = Rows(scope.parameters, *options)
        self.outside = Rows(scope.outside, *options) if scope.outside else None
        self.rows.reserve(1 + settings.history + (settings.row_ema is not None))
        self.batch = self.rows.take()
        self.smooth = self.rows.take() if settings.row_ema is not None else None
        self.bank: list[int] = []
        self.history: deque[int] = deque()
        self.extra: list[int] = []
        self.norms: deque[float] = deque(maxlen=_REMEMBERED)
        self.filled = False
        self.usable = True
        self._smoothed = False

    @property
    def protected(self) -> int:
        """Slot of the row that stands for the window: its gradient, or the smoothed one."""
        return self.batch if self.smooth is None else self.smooth

    @property
    def bytes(self) -> int:
        """Memory of all rows on this process."""
        return self.rows.bytes + (self.outside.bytes if self.outside else 0)

    def add(self, gradients: Sequence[torch.Tensor | None], weight: float = 1.0) -> None:
        """Add the gradient of a retain micro-loss over all trained parameters to the window."""
        count = len(self._scope.parameters)
        self.rows.add(self.batch, gradients[:count], weight)
        if self.outside is not None:
            self.outside.add(0, gradients[count:], weight)
        self.filled = True

    def add_extra(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Store a protected row of its own for this window."""
        if "extra" not in self._settings.rows:
            raise RecipeError(
                "this projector takes no rows of their own",
                expected="'extra' among the rows",
                found=tuple(self._settings.rows),
            )
        slot = self.rows.take()
        self.extra.append(slot)
        self.rows.add(slot, gradients[: len(self._scope.parameters)])

    def make_room_for(self, bank: Bank) -> None:
        """Take slots for a bank's rows, giving those of an earlier bank back."""
        for slot in self.bank:
            self.rows.give_back(slot)
        self.rows.reserve(self._used() + len(bank))
        self.bank = [self.rows.take() for _ in range(len(bank))]

    def _used(self) -> int:
        return 1 + (self.smooth is not None) + self._settings.history + len(self.extra)

    def smooth_over(self) -> None:
        """Update the smoothed row: ``e <- beta e + (1 - beta) R``, and R itself at first."""
        if self.smooth is None or not self.filled:
            return
        spoilt = sum(int((~torch.isfinite(flat)).sum()) for flat in self.rows.flats(self.batch))
        if float(self.rows.total(torch.tensor([spoilt], dtype=torch.float64))):
            return
        beta = self._settings.row_ema if self._smoothed else 0.0
        pairs = zip(self.rows.flats(self.smooth), self.rows.flats(self.batch), strict=True)
        for smooth, batch in pairs:
            smooth.lerp_(batch, 1 - (beta or 0.0))
        self.rows.touched(self.smooth)
        self._smoothed = True

    def kinds(self) -> dict[str, list[int]]:
        """Return the slots in use by kind of row."""
        slots = {
            "batch": [self.protected] if self.filled else [],
            "bank": self.bank,
            "history": list(self.history),
            "extra": self.extra,
        }
        return {kind: slots[kind] for kind in self._settings.rows}

    def active(self, K: torch.Tensor, forget: float) -> tuple[torch.Tensor, list[str]]:
        """Return which slots are protected, [slots], and flags for those left out.

        A row is left out when it is zero, or so far below the median of the norms (of rows, past
        windows and the forget gradient) that it is rounding noise: the gradient of a divergence
        to the starting model is such noise at the start, and normalising it would protect chance.

        Args:
            K: Gram matrices per parameter, [tensors, slots, slots], with finite entries.
            forget: Norm of the forget gradient, or of the update.
        """
        norms = K.diagonal(dim1=-2, dim2=-1).sum(0).clamp(min=0).sqrt()
        slots = [slot for kind in self.kinds().values() for slot in kind]
        known = [float(norms[slot]) for slot in slots if norms[slot] > 0]
        reference = torch.tensor([*known, *self.norms, *([forget] if forget > 0 else [])])
        least = _TINY * float(reference.quantile(0.5)) if len(reference) else 0.0
        active, flags = torch.zeros(len(norms), dtype=torch.bool), []
        wide = self._settings.row_dtype == torch.float64
        for slot in slots:
            norm = float(norms[slot])
            active[slot] = norm > least and (wide or norm**2 > _SQUARE_UNDERFLOW)
            if not active[slot]:
                flags.append("zero_row" if norm == 0 else "tiny_row")
        return active, flags

    def spoilt(self, K: torch.Tensor) -> list[int]:
        """Return the slots in use whose rows are not finite."""
        squares = K.diagonal(dim1=-2, dim2=-1).sum(0)
        used = {self.batch, *(slot for kind in self.kinds().values() for slot in kind)}
        return sorted(slot for slot in used if not bool(torch.isfinite(squares[slot])))

    def drop(self, slot: int) -> None:
        """Forget a row that is not finite."""
        if slot in self.history:
            self.history.remove(slot)
        if slot in self.extra:
            self.extra.remove(slot)
        if slot in (*self.bank, self.batch, self.smooth):
            self.rows.clear(slot)
        else:
            self.rows.give_back(slot)
        self._smoothed = self._smoothed and slot != self.smooth

    def close(self) -> None:
        """End the window: its row joins the history, the oldest leaves, the rest is cleared."""
        for slot in self.extra:
            self.rows.give_back(slot)
        self.extra = []
        if self.filled and self.usable and self._settings.history:
            if len(self.history) == self._settings.history:
                self.rows.give_back(self.history.popleft())
            self.history.append(self.batch)
            self.batch = self.rows.take()
        else:
            self.rows.clear(self.batch)
        if self.outside is not None:
            self.outside.clear(0)
        self.filled, self.usable = False, True

    def forget(self) -> None:
        """Empty every row, keeping the bank's slots."""
        for slot in [*self.extra, *self.history]:
            self.rows.give_back(slot)
        for slot in [self.batch, *self.bank, *([] if self.smooth is None else [self.smooth])]:
            self.rows.clear(slot)
        if self.outside is not None:
            self.outside.clear(0)
        self.extra, self.history = [], deque()
        self.norms.clear()
        self.filled, self.usable, self._smoothed = False, True, False

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that a closed window carries over."""
        return {
            "rows": self.rows.state_dict(),
            "batch": self.batch,
            "smooth": self.smooth,
            "smoothed": self._smoothed,
            "bank": list(self.bank),
            "history": list(self.history),
            "norms": list(self.norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.rows.load_state_dict(state["rows"])
        self.batch, self.smooth = state["batch"], state["smooth"]
        self._smoothed = state["smoothed"]
        self.bank, self.history = list(state["bank"]), deque(state["history"])
        self.norms = deque(state["norms"], maxlen=_REMEMBERED)
        self.extra, self.filled, self.usable = [], False, True
