"""Turn samples of LoRA merges into medians, ratios to the floors, and targets met or missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lora_contenders import LoraContender
from processes import Sample
from rich.console import Console
from rich.table import Table
from speed_summary import ratio

__all__ = ["growth", "print_report", "summarise", "targets"]

Samples = Mapping[str, Sequence[Sample]]

_DEFAULT = "orthomerge-do-merging"
_MOST_TIMES_FLOOR = 3.0
_MOST_BYTES = 2e9
_FIELDS = ("wall_seconds", "cpu_seconds", "peak_rss_bytes", "peak_anonymous_bytes")


def summarise(
    order: Sequence[LoraContender], samples: Samples, quality: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return medians of each contender, its time over its floor's, and its error.

    ``error`` is the largest over the modules looked at, relative to what the result should be;
    ``distance_from_sum`` says how far the method goes from the weighted sum, which is no error.
    """
    summary: dict[str, dict[str, Any]] = {}
    for one in order:
        runs = samples.get(one.name, ())
        if not runs:
            continue
        facts: dict[str, Any] = {}
        for field in _FIELDS:
            values = [v for v in (getattr(run, field) for run in runs) if v is not None]
            facts[field] = median(values) if values else None
        facts["scale"], facts["floor"] = one.scale, one.floor
        facts["over_floor"] = ratio(samples, one.name, one.floor) if one.floor else None
        found = quality.get(one.name, {}).values()
        facts["truth"] = one.truth
        facts["error"] = max((f[one.truth] for f in found), default=None) if one.truth else None
        facts["distance_from_sum"] = max((f["sum"] for f in found), default=None)
        summary[one.name] = facts
    return summary


def targets(summary: Mapping[str, Any], layers: int) -> list[dict[str, Any]]:
    """Return each target with what was measured."""
    facts = summary[_DEFAULT]
    found = [
        _target("do-merging: wall time / floor", facts["over_floor"], _MOST_TIMES_FLOOR),
        _target("do-merging: peak RSS in GB", facts["peak_rss_bytes"] / 1e9, _MOST_BYTES / 1e9),
    ]
    dense, own = summary.get("peft-svd-one-layer"), summary.get("orthomerge-svd")
    if dense and own:
        quicker = layers * dense["wall_seconds"] / own["wall_seconds"]
        found.append(
            _target(f"svd: PEFT's time for one layer × {layers} / ours", quicker, None, 1.0)
        )
    return found


def _target(
    what: str, measured: float, at_most: float | None, at_least: float | None = None
) -> dict[str, Any]:
    met = (at_most is None or measured <= at_most) and (at_least is None or measured >= at_least)
    measured = round(measured, 4)
    return {
        "target": what,
        "at_least": at_least,
        "at_most": at_most,
        "measured": measured,
        "met": met,
    }


def growth(scaling: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return per method how time grows when the hidden size doubles, number and rank fixed.

    2 is linear; a cost of m n would be 4.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in scaling["hidden"]:
        found.setdefault(row["method"], []).append(row)
    return [
        {
            "method": method,
            "hidden": [rows[-2]["hidden"], rows[-1]["hidden"]],
            "times": rows[-1]["seconds_per_module"] / rows[-2]["seconds_per_module"],
        }
        for method, rows in found.items()
    ]


def print_report(result: Mapping[str, Any]) -> None:
    """Print the figures and the targets."""
    table = Table(title=f"8 LoRA adapters in, one out; {result['rounds']} round(s)")
    table.add_column("contender", no_wrap=True)
    for title in ("wall s", "CPU s", "RSS MB", "× floor", "error", "from sum"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, facts in result["summary"].items():
        table.add_row(
            name,
            f"{facts['wall_seconds']:.2f}",
            f"{facts['cpu_seconds']:.2f}",
            f"{facts['peak_rss_bytes'] / 1e6:.0f}",
            _number(facts["over_floor"], ".2f"),
            _number(facts["error"], ".1e"),
            _number(facts["distance_from_sum"], ".3f"),
        )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    for name, why in result["failures"].items():
        console.print(f"failed       {name}: {why}")
    for row in result["targets"]:
        verdict = "met" if row["met"] else "MISSED"
        limit = row["at_most"] if row["at_least"] is None else row["at_least"]
        console.print(f"{verdict:12} {row['target']}: {row['measured']:.2f} (limit {limit})")
    for row in result["growth"]:
        console.print(f"hidden x 2   {row['method']}: time x {row['times']:.2f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
