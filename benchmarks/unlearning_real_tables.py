"""The tables of the documentation that the result of ``unlearning_real.py`` fills."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["real_text_table"]


def real_text_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per arm: means over the seeds, and the range of what is compared."""
    rows = [
        "| objective | α | projection | forget | retain | holdout "
        "| retain rise at the level (range) | steps | s per step |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for key, runs in _grouped(result["runs"]).items():
        objective, alpha, projection = key
        losses = [_losses(runs, name) for name in ("forget", "retain", "holdout")]
        steps = statistics.mean(run["steps"] for run in runs)
        pace = statistics.mean(run["seconds_in_steps"] / run["steps"] for run in runs)
        cells = [objective, f"{alpha:g}", projection, *losses, _rise(runs)]
        rows.append("| " + " | ".join([*cells, f"{steps:.0f}", f"{pace:.2f}"]) + " |")
    return rows


def _grouped(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        key = (run["objective"], run["alpha"], run["projection"])
        groups.setdefault(key, []).append(run)
    return groups


def _losses(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    before, after = (
        statistics.mean(run["table"][name][f"loss_{when}"] for run in runs)
        for when in ("before", "after")
    )
    return f"{before:.2f} → {after:.2f}"


def _rise(runs: Sequence[Mapping[str, Any]]) -> str:
    rises = [run["retain_rise_at_level"] for run in runs]
    if None in rises:
        missed = rises.count(None)
        return f"not reached ({missed} of {len(rises)})"
    mean = statistics.mean(rises)
    if len(rises) == 1:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} ({min(rises):+.3f} to {max(rises):+.3f})"
