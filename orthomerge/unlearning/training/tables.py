"""The table of a run: how well every set is predicted before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orthomerge.unlearning.training.measuring import SetScores

__all__ = ["SetTable", "table_of"]


@dataclass(frozen=True, slots=True)
class SetTable:
    """One set before and after.

    Attributes:
        name: ``forget``, ``retain`` or ``holdout``.
        rows: How many were measured.
        loss_before: Mean over rows of the loss per token, nats.
        loss_after: The same afterwards.
        probability_before: Mean over rows of ``exp(-loss per token)``.
        probability_after: The same afterwards.
    """

    name: str
    rows: int
    loss_before: float
    loss_after: float
    probability_before: float
    probability_after: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row as one JSON-ready object."""
        return asdict(self)


def table_of(
    before: Mapping[str, SetScores], after: Mapping[str, SetScores]
) -> tuple[SetTable, ...]:
    """Return the rows of the table."""
    return tuple(
        SetTable(
            name=name,
            rows=len(was.total),
            loss_before=was.loss,
            loss_after=after[name].loss,
            probability_before=was.probability,
            probability_after=after[name].probability,
        )
        for name, was in before.items()
    )
