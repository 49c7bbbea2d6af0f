"""A weight of the retain loss that is a dual variable: it grows while the loss is above a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from orthomerge.errors import NumericalError, RecipeError

__all__ = ["Dual"]


class Dual:
    """``λ <- max(0, λ + η (L_r - ε))``, after every step or every epoch.

    Args:
        start: λ at the start.
        tolerance: ε, what the retain loss may be.
        dual_step: η.
        warmup_epochs: Until so many epochs are over, λ stays.
        update: ``step``: with the loss of every step; ``epoch``: with the mean of an epoch's.

    >>> dual = Dual(1.0, tolerance=0.5, dual_step=2.0)
    >>> dual.after_step(0.75, epoch=0.1)
    >>> dual.value
    1.5
    """

    def __init__(
        self,
        start: float,
        *,
        tolerance: float,
        dual_step: float = 1.0,
        warmup_epochs: float = 0.0,
        update: Literal["step", "epoch"] | str = "step",
    ) -> None:
        self.value = float(start)
        self._tolerance, self._step = tolerance, dual_step
        self._warmup, self._per_epoch = warmup_epochs, update == "epoch"
        self._epoch, self._sum, self._count = 0.0, 0.0, 0

    def after_step(self, retain_loss: float, *, epoch: float | None = None) -> None:
        """Take note of one optimiser step.

        Args:
            retain_loss: L_r of the step's batch before the step, as it was measured: not weighted,
                not projected, without ε.
            epoch: Epochs done after the step, as a fraction; may be None where nothing waits for
                one.

        Raises:
            NumericalError: The loss is not finite, which would be λ's end.
            RecipeError: The epoch is needed and was not given.
        """
        if not math.isfinite(retain_loss):
            raise NumericalError("the retain loss of a step is not finite", found=retain_loss)
        if epoch is None and (self._per_epoch or self._warmup > 0):
            raise RecipeError(
                "the dual variable waits for epochs, and the loop does not say which one it is in",
                remedy="Pass epoch to after_step, or set update to step and warmup_epochs to 0.",
            )
        if self._per_epoch:
            self._note(retain_loss, epoch or 0.0)
        elif epoch is None or self._warmup == 0 or epoch > self._warmup:
            self._move(retain_loss)

    def _note(self, retain_loss: float, epoch: float) -> None:
        self._sum, self._count = self._sum + retain_loss, self._count + 1
        before, self._epoch = self._epoch, epoch + 1e-9  # 3 * (1 / 3) may fall short of 1
        if math.floor(self._epoch) > math.floor(before):
            mean, self._sum, self._count = self._sum / self._count, 0.0, 0
            if self._epoch >= self._warmup:
                self._move(mean)

    def _move(self, retain_loss: float) -> None:
        self.value = max(0.0, self.value + self._step * (retain_loss - self._tolerance))

    def state_dict(self) -> dict[str, float]:
        """Return λ and the running sums of the epoch."""
        return {
            "value": self.value, "epoch": self._epoch, "sum": self._sum, "count": self._count
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another one's ``state_dict`` returned."""
        self.value, self._epoch = float(state["value"]), float(state["epoch"])
        self._sum, self._count = float(state["sum"]), int(state["count"])
