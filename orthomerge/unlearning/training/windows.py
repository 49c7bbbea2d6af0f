"""What share of an optimizer step each of its batches is, so that sums are means over all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orthomerge.unlearning.objectives import Objective

__all__ = ["window_shares"]


def window_shares(
    objective: Objective, batches: Sequence[Mapping[str, Any]]
) -> list[dict[str, float]]:
    """Return each batch's share of the window's forget and retain loss.

    A loss is a mean over its scored tokens, or rows; weighted by its share of them, the losses of
    several batches add up to the loss of all their rows together.

    Args:
        objective: Says what its losses are means over.
        batches: The batches of one optimizer step.
    """
    forget = [float(objective.forget_count(batch)) for batch in batches]
    retain = [float(objective.retain_count(b)) if "retain" in b else 0.0 for b in batches]
    return [
        {"forget": f, "retain": r} for f, r in zip(_shares(forget), _shares(retain), strict=True)
    ]


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return (
        [1.0 if count == total else count / total for count in counts]
        if total
        else [0.0 for _ in counts]
    )
