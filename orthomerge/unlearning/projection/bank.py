"""The bank: rows that cover as much of the retain set as affordable, computed anew now and then.

What a group of retain rows is, and its losses, come from the caller as callables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from orthomerge.errors import RecipeError
from orthomerge.unlearning.projection.capturing import Backward, gradients_of
from orthomerge.unlearning.projection.rows import Rows

__all__ = ["Bank", "BankGroup"]

BankGroup = Callable[[], Iterable[tuple[torch.Tensor, float]]]


class Bank:
    """Groups of retain rows; the gradient of a group's weighted mean loss is one protected row.

    Args:
        groups: Callables that yield (loss, weight) for the group's micro-batches; every loss is
            differentiated before the next is asked for.
        refresh_every: Windows between two refreshes.
        backward: What to call in place of ``loss.backward()``.
    """

    def __init__(
        self,
        groups: Sequence[BankGroup],
        refresh_every: int,
        backward: Backward | None = None,
    ) -> None:
        if not groups:
            raise RecipeError("a bank needs at least one group of retain rows")
        self._groups, self._every, self._backward = tuple(groups), refresh_every, backward
        self.age: int | None = None

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def due(self) -> bool:
        """Return whether the rows are missing or too old."""
        return self.age is None or self.age >= self._every

    def refresh(
        self, rows: Rows, slots: Sequence[int], trained: Sequence[torch.Tensor], protected: int
    ) -> None:
        """Compute every row anew.

        Args:
            rows: Where the rows are stored.
            slots: One slot per group.
            trained: Parameters whose gradients a backward pass may touch, protected ones first.
            protected: How many of them are protected.

        Raises:
            RecipeError: A group yields nothing, or weights that add up to nothing.
        """
        for number, (group, slot) in enumerate(zip(self._groups, slots, strict=True)):
            rows.clear(slot)
            total = 0.0
            for loss, weight in group():
                gradients = gradients_of(loss, trained, self._backward)
                rows.add(slot, gradients[:protected], weight)
                total += weight
            if not total > 0:
                raise RecipeError(
                    f"group {number} of the bank has no weight",
                    found=total,
                    remedy="Every group must yield (loss, weight) pairs.",
                )
            rows.scale(slot, 1 / total)
        self.age = 0
