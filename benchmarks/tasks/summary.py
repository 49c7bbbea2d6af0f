"""From measured cells to the figures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.contenders import REFERENCES
from tasks.intervals import Outcomes, Resampled, difference, normalised, worst
from tasks.protocol import unpacked

__all__ = ["family_summary"]

Cells = Mapping[str, Mapping[int, Mapping[str, Any]]]


def family_summary(
    cells: Cells, tasks: Sequence[str], counts: Mapping[str, int], *, draws: int = 4000
) -> dict[str, Any]:
    """Return every figure of one family.

    Args:
        cells: Method → seed → cell, ``base`` and ``experts`` among them. Methods that lack a seed
            that another one has are compared on the seeds that all have.
        tasks: In the order of the report.
        counts: ``test`` and ``held_out``: texts per task.
        draws: Of the bootstrap.
    """
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in cells.values())))
    if not seeds:
        return {"seeds": [], "methods": {}}
    sets = Resampled(dict.fromkeys(tasks, counts["test"]), len(seeds), draws=draws)
    experts = _outcomes(cells["experts"], seeds, "untuned", counts["test"])
    methods = {}
    for name, by_seed in cells.items():
        found: dict[str, Any] = {"form": by_seed[seeds[0]].get("form")}
        for setting in ("tuned", "untuned"):
            if setting in by_seed[seeds[0]]:
                ours = _outcomes(by_seed, seeds, setting, counts["test"])
                found[setting] = _figures(sets, ours, experts, tasks)
        if "tuned" in found:
            found["strengths"] = [by_seed[seed]["strength"] for seed in seeds]
        if "own_strength" in by_seed[seeds[0]]:
            found["own_strengths"] = [round(by_seed[s]["own_strength"], 3) for s in seeds]
            found["merge_seconds"] = min(by_seed[seed]["seconds"]["merge"] for seed in seeds)
        methods[name] = found
    _add_contrasts(methods, cells, sets, seeds, counts["test"])
    if counts["held_out"] and len(tasks) > 2:
        _add_held_out(methods, cells, tasks, seeds, counts["held_out"], draws)
    return {"seeds": seeds, "methods": methods}


def _outcomes(by_seed: Mapping[int, Any], seeds: Sequence[int], part: str, count: int) -> Outcomes:
    return [{t: unpacked(b, count) for t, b in by_seed[seed][part].items()} for seed in seeds]


def _figures(
    sets: Resampled, ours: Outcomes, experts: Outcomes, tasks: Sequence[str]
) -> dict[str, Any]:
    accuracies = sets.accuracies(ours)[0].mean(0)
    return {
        "accuracy": sets.mean(ours).record(),
        "normalised": normalised(sets, ours, experts).record(),
        "worst_task": worst(sets, ours, experts).record(),
        "by_task": {t: round(float(a), 6) for t, a in zip(tasks, accuracies, strict=True)},
    }


def _add_contrasts(
    methods: dict[str, Any], cells: Cells, sets: Resampled, seeds: Sequence[int], count: int
) -> None:
    for name, found in methods.items():
        for setting in ("tuned", "untuned"):
            if "own_strengths" not in found or setting not in found:
                continue
            ours = _outcomes(cells[name], seeds, setting, count)
            found[setting]["minus"] = {
                other: difference(
                    sets, ours, _outcomes(cells[other], seeds, setting, count)
                ).record()
                for other in REFERENCES
                if other in cells and other != name and setting in cells[other][seeds[0]]
            }


def _add_held_out(
    methods: dict[str, Any],
    cells: Cells,
    tasks: Sequence[str],
    seeds: Sequence[int],
    count: int,
    draws: int,
) -> None:
    """Add the accuracy on each task when its expert is left out, and what it is above the base."""
    sets = Resampled(dict.fromkeys(tasks, count), len(seeds), draws=draws)
    base = _outcomes(cells["base"], seeds, "held_out_untuned", count)
    for name, found in methods.items():
        for setting in ("tuned", "untuned"):
            part = f"held_out_{setting}"
            if part in cells[name][seeds[0]]:
                ours = _outcomes(cells[name], seeds, part, count)
                found[setting]["held_out"] = sets.mean(ours).record()
                found[setting]["held_out_minus_base"] = difference(sets, ours, base).record()
