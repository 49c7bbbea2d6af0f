"""Where a run reaches a level of forgetting, and what two runs differ by there: numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Goal", "at_level", "interpolated", "reductions", "spread"]


@dataclass(frozen=True)
class Goal:
    """What a model that never saw the forget rows makes of them.

    Args:
        loss: Mean loss.
        exact: Share of rows that it happens to reproduce.
    """

    loss: float
    exact: float

    def places(
        self, forget: Sequence[float], exact: Sequence[float]
    ) -> tuple[float | None, float | None]:
        """Return after how many steps the mean loss is reached, and also the share of rows.

        A mean can be reached by a few rows that are forgotten beyond measure while others are
        still known by heart: the second place says when that is over.
        """
        mean = at_level(forget, self.loss)
        rows = at_level([-share for share in exact], -self.exact)
        return mean, None if mean is None or rows is None else max(mean, rows)


def at_level(forget: Sequence[float], level: float) -> float | None:
    """Return after how many steps, in fractions, a curve first reaches a level; None if never.

    Args:
        forget: Loss before the first step, after it, and so on.
        level: To be reached from below.
    """
    for step, loss in enumerate(forget):
        if loss >= level:
            if step == 0:
                return 0.0
            before = forget[step - 1]
            return step - 1 + (level - before) / (loss - before)
    return None


def interpolated(values: Sequence[float], place: float) -> float:
    """Return a curve's value between two steps, on the straight line between them."""
    step = min(int(place), len(values) - 1)
    if step == len(values) - 1:
        return values[step]
    return values[step] + (place - step) * (values[step + 1] - values[step])


def reductions(
    plain: Mapping[int, float | None], guarded: Mapping[int, float | None]
) -> dict[int, float]:
    """Return by seed which share of the plain run's drift the guarded run avoids.

    Seeds in which either run never reached the level are left out.
    """
    found = {}
    for seed, before in plain.items():
        after = guarded.get(seed)
        if before is not None and after is not None:
            found[seed] = 1 - after / before
    return found


def spread(values: Mapping[int, float]) -> dict[str, Any] | None:
    """Return mean, smallest, largest and the values by seed; None of nothing."""
    if not values:
        return None
    numbers = list(values.values())
    return {
        "mean": round(sum(numbers) / len(numbers), 5),
        "least": round(min(numbers), 5),
        "most": round(max(numbers), 5),
        "by_seed": {str(seed): round(value, 5) for seed, value in values.items()},
    }
