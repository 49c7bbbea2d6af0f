"""One strength for every method: the size of the whole update, relative to the sum of all updates.

With ``U`` a method's total update and ``D_i`` the models' changes, all taken over every merged
tensor, a norm-matched strength a gives ``W_0 + a · ‖Σ D_i‖ / ‖U‖ · U``: the same a then means the
same distance from the base for every method.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.errors import NumericalError

__all__ = ["UpdateNorms"]

_ROUNDING = 1e-6  # of the base's size: a few steps of float32


class UpdateNorms:
    """Sums of squares of the update and of the plain sum of changes; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._updates: list[float] = []
        self._sums: list[float] = []
        self._origins: list[float] = []

    def add(self, update: Tensor, deltas: Sequence[Tensor], origin: Tensor | None = None) -> None:
        """Count one piece in; without a base to which it is added, ``origin`` is None."""
        total = sum(deltas[1:], deltas[0])
        self.add_squares(
            *(
                torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2
                for values in (update, total, *([] if origin is None else [origin]))
            )
        )

    def add_squares(self, update: float, total: float, *origin: float) -> None:
        """Count squared norms in: of an update, of the sum of the changes, of the base."""
        with self._lock:
            self._updates.append(update)
            self._sums.append(total)
            self._origins += origin

    def factor(self, strength: float) -> float:
        """Return what the update is multiplied by for a norm-matched strength.

        Raises:
            NumericalError: The method's update is zero although the models changed.
        """
        # Exactly rounded sums, so that the order in which threads finish does not matter.
        update, total = math.fsum(self._updates), math.fsum(self._sums)
        # An update of the size of rounding has no direction that could be scaled up.
        rounding = (_ROUNDING * math.sqrt(math.fsum(self._origins))) ** 2
        if total <= rounding and update <= rounding:
            return 1.0
        if update <= rounding:
            raise NumericalError(
                "the merged update is zero but for rounding, so no norm-matched strength exists",
                remedy="Leave norm_matched out, or change the method's parameters.",
            )
        return strength * math.sqrt(total / update)
