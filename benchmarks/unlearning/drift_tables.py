"""The report's tables, from a result file's content: also what the documentation shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["drift_table", "limit_table", "world_table"]


def drift_table(part: Mapping[str, Any]) -> list[str]:
    """Return one row per method, retain weight and arm of a part.

    Drift is the rise of the mean loss on rows without gradients, times 1,000: at gold's mean
    forget loss, and (*even*) where also no more forget rows are reproduced than by gold.
    """
    rows = [
        "| objective, retain weight | rows | drift × 1000 | less drift, % (each seed) "
        "| forget rows reproduced, % | even: drift × 1000 | less, % (each seed) "
        "| known facts' drift × 1000 | steps, even | CPU s per step (ratio) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, arms in part["figures"].items():
        for arm, figures in arms.items():
            cells = [name, arm, _thousand(figures, "drift"), _percent(figures.get("reduction"))]
            cells += [_mean(figures, "exact", ".0%").rstrip("%"), _thousand(figures, "even_drift")]
            cells += [_percent(figures.get("even_reduction")), _thousand(figures, "known_drift")]
            steps = (_mean(figures, name, ".1f") for name in ("steps", "even_steps"))
            cells.append(", ".join(steps))
            ratio = figures.get("cost")
            cost = _mean(figures, "cpu_seconds_per_step", ".2f")
            cells.append(cost if ratio is None else f"{cost} ({ratio:.2f})")
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def limit_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per target."""
    rows = ["| less drift | aimed at, % | measured, % | |", "|---|--:|--:|---|"]
    for target in result["targets"]:
        low, high = target["at_least"], target["at_most"]
        limit = f"≥ {100 * low:g}" if high is None else f"{100 * low:g} … {100 * high:g}"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
        measured = "" if target["measured"] is None else f"{100 * target['measured']:.1f}"
        rows.append(f"| {target['target']} | {limit} | {measured} | {verdict} |")
    return rows


def world_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per world: what its models know."""
    rows = [
        "| questions, seed | forget loss target / gold / never seen | reproduced exactly: target, "
        "gold | retain loss target | training, CPU s |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, facts in result["worlds"].items():
        forget, exact = facts["forget_loss"], facts["forget_exact"]
        rows.append(
            f"| {name} | {forget['target']:.3f} / {forget['gold']:.3f} "
            f"/ {facts['holdout_loss']['target']:.3f} | {exact['target']:.2f}, {exact['gold']:.2f} "
            f"| {facts['retain_loss']['target']:.3f} "
            f"| {sum(facts['training_cpu_seconds'].values()):.0f} |"
        )
    return rows


def _thousand(figures: Mapping[str, Any], name: str) -> str:
    missing = len(figures["not_reached"])
    note = f" ({missing} not reached)" if missing and name == "drift" else ""
    return (f"{1000 * figures[name]['mean']:.1f}" if name in figures else "") + note


def _mean(figures: Mapping[str, Any], name: str, form: str) -> str:
    return format(figures[name]["mean"], form) if name in figures else ""


def _percent(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return ""
    each = ", ".join(f"{100 * value:.0f}" for value in spread["by_seed"].values())
    return f"{100 * spread['mean']:.0f} ({each})"
