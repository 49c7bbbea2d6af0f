"""What share of an optimizer step each of its batches is, so that sums are means over all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orthomerge.unlearning.objectives import Objective
from orthomerge.unlearning.training.distributing import Processes

__all__ = ["window_shares"]


def window_shares(
    objective: Objective,
    batches: Sequence[Mapping[str, Any]],
    processes: Processes | None = None,
) -> list[dict[str, float]]:
    """Return each batch's share of the window's forget and retain loss.

    A loss is a mean over its scored tokens, or rows; weighted by its share of them, the losses of
    several batches add up to the loss of all their rows together. Over several processes, whose
    gradients are averaged, it is the mean of their sums that is this loss.

    Args:
        objective: Says what its losses are means over.
        batches: The batches of one optimizer step, on this process.
        processes: Those that share the step.
    """
    forget = [float(objective.forget_count(batch)) for batch in batches]
    retain = [float(objective.retain_count(b)) if "retain" in b else 0.0 for b in batches]
    totals = [sum(forget), sum(retain)]
    if processes is not None:
        totals = processes.mean(totals)
    return [
        {"forget": f, "retain": r}
        for f, r in zip(_shares(forget, totals[0]), _shares(retain, totals[1]), strict=True)
    ]


def _shares(counts: Sequence[float], total: float) -> list[float]:
    return [1.0 if count == total else count / total if total else 0.0 for count in counts]
