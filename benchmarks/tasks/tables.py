"""The report's tables, from a result file's content: also what the documentation shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.contenders import REFERENCES

__all__ = ["method_table", "task_table"]


def method_table(family: Mapping[str, Any], setting: str) -> list[str]:
    """Return one row per method of one family, in percent, best mean accuracy first.

    Args:
        family: One entry of the result's ``families``.
        setting: ``tuned`` (strength chosen on validation texts) or ``untuned`` (the default).
    """
    columns = [
        "method", "mean accuracy", "of the experts'", "worst task's", "strength",
        *(f"minus {reference}" for reference in REFERENCES), "tasks without expert, minus base",
    ]  # fmt: skip
    rows = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for name, found, figures in _ordered(family, setting):
        minus = figures.get("minus", {})
        used = found.get("strengths" if setting == "tuned" else "own_strengths", [])
        cells = [
            name,
            _range(figures["accuracy"], ""),
            f"{100 * figures['normalised']['value']:.1f}",
            f"{100 * figures['worst_task']['value']:.1f}",
            " ".join(f"{strength:.3g}" for strength in used),
            *(_range(minus.get(reference), "+") for reference in REFERENCES),
            _range(figures.get("held_out_minus_base"), "+"),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def task_table(family: Mapping[str, Any], setting: str) -> list[str]:
    """Return one row per method: its accuracy on each task, in percent, mean over the seeds."""
    ordered = _ordered(family, setting)
    tasks = list(ordered[0][2]["by_task"]) if ordered else []
    rows = ["| " + " | ".join(["method", *tasks]) + " |", "|---" + "|--:" * len(tasks) + "|"]
    for name, _, figures in ordered:
        cells = [f"{100 * figures['by_task'][task]:.1f}" for task in tasks]
        rows.append("| " + " | ".join([name, *cells]) + " |")
    return rows


def _ordered(
    family: Mapping[str, Any], setting: str
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Return (name, everything, figures of the setting): experts and base first, then the best."""
    rows = []
    for name, found in family["methods"].items():
        fixed = name in ("experts", "base")
        if fixed or setting in found:
            figures = found["untuned" if fixed else setting]
            rows.append((not fixed, -figures["accuracy"]["value"], name, found, figures))
    return [row[2:] for row in sorted(rows, key=lambda row: row[:3])]


def _range(figure: Mapping[str, Any] | None, sign: str) -> str:
    """Return a value with the interval over texts and seeds."""
    if figure is None:
        return ""
    ends = (figure["value"], *figure["interval_texts_and_seeds"])
    value, low, high = (f"{100 * end:{sign}.1f}" for end in ends)
    return f"{value} [{low}, {high}]"
