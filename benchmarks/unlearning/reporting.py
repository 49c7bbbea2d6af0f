"""From the curves of all runs to the figures of the report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from unlearning.crossing import Goal, interpolated, reductions, spread

__all__ = ["cell_figures", "part_figures", "targets"]

Cell = Mapping[str, Any]
#: Method → retain weight → arm → seed → figures of one run.
Cells = Mapping[str, Mapping[float, Mapping[str, Mapping[int, Cell]]]]


def cell_figures(curves: Mapping[str, Sequence[float]], goal: Goal) -> dict[str, Any]:
    """Return what one run gives at equal forgetting; ``drift`` is None if it got nowhere.

    ``drift`` is at the goal's mean loss, ``even_drift`` where no more rows are reproduced either.
    """
    place, even = goal.places(curves["forget"], curves["exact"])
    seconds = curves["cpu_seconds"]
    figures: dict[str, Any] = {
        "goal": {"loss": round(goal.loss, 5), "exact": goal.exact},
        "forget": [round(value, 5) for value in curves["forget"]],
        "exactly": [round(value, 4) for value in curves["exact"]],
        "retain": [round(value, 5) for value in curves["drift"]],
        "cpu_seconds_per_step": round(statistics.mean(seconds), 4) if seconds else None,
        "drift": None,
        "even_drift": None,
    }
    if "residual" in curves:
        figures["residual"] = max(curves["residual"])
        figures["cosine"] = max(curves["cosine"])
    if place is not None:
        figures["drift"] = _rise(curves["drift"], place)
        figures["known_drift"] = _rise(curves["known"], place)
        figures["steps"] = round(place, 3)
        figures["exact"] = round(interpolated(curves["exact"], place), 4)
    if even is not None:
        figures["even_drift"] = _rise(curves["drift"], even)
        figures["even_steps"] = round(even, 3)
    return figures


def _rise(curve: Sequence[float], place: float) -> float:
    return round(interpolated(curve, place) - curve[0], 6)


def part_figures(cells: Cells, arms: Sequence[str], *, tuned: bool) -> dict[str, Any]:
    """Return one entry per method and retain weight, or per method if that is tuned.

    Args:
        cells: All runs of the part.
        arms: The first one is what the others are compared with.
        tuned: Each arm gets, for each seed, the retain weight that was best on the other seeds.
    """
    found = {}
    for method, by_weight in cells.items():
        for weight, by_arm in by_weight.items():
            found[f"{method} {weight:g}"] = _compared(by_arm, arms)
        if tuned:
            best = {arm: _best_elsewhere({w: by[arm] for w, by in by_weight.items()})
                    for arm in arms}  # fmt: skip
            found[f"{method} tuned"] = _compared(best, arms)
    return found


def _best_elsewhere(by_weight: Mapping[float, Mapping[int, Cell]]) -> dict[int, Cell]:
    """Return each seed's run at the weight with the least mean drift of the other seeds."""
    seeds = list(next(iter(by_weight.values())))
    if len(seeds) < 2:
        return {}
    chosen = {}
    for seed in seeds:
        means = {}
        for weight, cells in by_weight.items():
            drifts = [cells[other]["drift"] for other in seeds if other != seed]
            if None not in drifts:
                means[weight] = statistics.mean(drifts)
        if means:
            weight = min(means, key=lambda w: means[w])
            chosen[seed] = {**by_weight[weight][seed], "retain_weight": weight}
    return chosen


def _compared(by_arm: Mapping[str, Mapping[int, Cell]], arms: Sequence[str]) -> dict[str, Any]:
    """Return each arm's figures over the seeds, and its reductions of drift seed by seed."""
    found = {}
    plain = by_arm[arms[0]]
    for arm in arms:
        own = by_arm[arm]
        figures = {
            name: spread({s: cell[name] for s, cell in own.items() if cell.get(name) is not None})
            for name in ("drift", "even_drift", "known_drift", "steps", "even_steps", "exact",
                         "cpu_seconds_per_step", "retain_weight")
        }  # fmt: skip
        found[arm] = {name: value for name, value in figures.items() if value is not None}
        found[arm]["not_reached"] = [seed for seed, cell in own.items() if cell["drift"] is None]
        if arm != arms[0]:
            for kind in ("", "even_"):
                drifts = (_values(cells, f"{kind}drift") for cells in (plain, own))
                found[arm][f"{kind}reduction"] = spread(reductions(*drifts))
            found[arm]["cost"] = _ratio(own, plain)
            for name in ("cosine", "residual"):
                found[arm][f"most_{name}"] = max(cell.get(name, 0.0) for cell in own.values())
    return found


def _values(cells: Mapping[int, Cell], name: str) -> dict[int, float | None]:
    return {seed: cell[name] for seed, cell in cells.items()}


def _ratio(own: Mapping[int, Cell], plain: Mapping[int, Cell]) -> float | None:
    """Return CPU seconds per step over those of the first arm, median over the seeds."""
    name = "cpu_seconds_per_step"
    both = (seed for seed in own if seed in plain and own[seed][name] and plain[seed][name])
    ratios = [own[seed][name] / plain[seed][name] for seed in both]
    return round(statistics.median(ratios), 3) if ratios else None


_USUAL = ("ga 0", "grad-diff 1", "npo 1")

#: Name, part, entry of its figures, arm, and between what the mean reduction is to be.
_LIMITS = (
    ("ga, bank", "main", "ga 0", "bank", 0.40, None),
    ("grad-diff, bank", "main", "grad-diff 1", "bank", 0.30, None),
    ("grad-diff, history", "main", "grad-diff 1", "history", 0.15, None),
    ("grad-diff tuned, bank", "tuned", "grad-diff tuned", "bank", 0.20, None),
    ("npo tuned, bank", "tuned", "npo tuned", "bank", 0.20, None),
    ("LoRA, ga, bank", "lora", "ga 0", "bank", 0.25, None),
    ("LoRA, npo, bank", "lora", "npo 10", "bank", 0.25, None),
    *((f"{method}, bound", "controls", method, "bound", 0.90, None) for method in _USUAL),
    *(
        (f"{method}, {arm}", "controls", method, arm, -0.02, 0.02)
        for method in _USUAL
        for arm in ("bank-shuffled", "bank-swapped")
    ),
)


def targets(parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was aimed at, and what was measured; means over the seeds."""
    found = []
    for name, part, method, arm, low, high in _LIMITS:
        if part not in parts:
            continue
        spread_of = parts[part]["figures"][method][arm]["reduction"]
        mean = None if spread_of is None else spread_of["mean"]
        met = None
        if mean is not None:
            met = (low is None or mean >= low) and (high is None or mean <= high)
        found.append(
            {"target": name, "at_least": low, "at_most": high, "measured": mean, "met": met}
        )
    return found
