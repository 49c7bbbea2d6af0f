"""Turn raw samples into medians, ratios within a round, and targets met or missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from processes import Sample
from rich.console import Console
from rich.table import Table

__all__ = ["print_report", "ratio", "summarise", "targets"]

Samples = Mapping[str, Sequence[Sample]]

_FIELDS = ("wall_seconds", "cpu_seconds", "peak_rss_bytes", "peak_anonymous_bytes")
_TABLE_WIDTH = 120
_SHARD_VARIANTS = ("orthomerge-linear-shards-200MB", "orthomerge-linear-shards-5GB")
#: Method -> (at most this many times the average floor, at least so many times faster than peer)
_SPEED_TARGETS = {"linear": (1.5, 2.5), "task-arithmetic": (1.5, 2.5), "ties": (4.0, 8.0)}


def ratio(samples: Samples, of: str, to: str, field: str = "wall_seconds") -> float | None:
    """Return the median over the rounds of one contender's figure divided by another's."""
    pairs = zip(samples.get(of, ()), samples.get(to, ()), strict=False)
    quotients = [getattr(a, field) / getattr(b, field) for a, b in pairs]
    return round(median(quotients), 4) if quotients else None


def summarise(samples: Samples) -> dict[str, dict[str, Any]]:
    """Return best, median and ratios of each contender.

    ``ratios`` are medians over the rounds of a figure divided by that of the floors, and of
    mergekit's same merge, in the same round: below 1 is quicker or smaller.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name, runs in samples.items():
        facts: dict[str, Any] = {}
        for field in _FIELDS:
            values = [v for v in (getattr(run, field) for run in runs) if v is not None]
            facts[field] = {
                "best": min(values, default=None),
                "median": median(values) if values else None,
                "largest": max(values, default=None),
            }
        facts["ratios"] = {
            peer: {field: ratio(samples, name, peer, field) for field in _FIELDS[:3]}
            for peer in _peers(name)
            if peer in samples
        }
        summary[name] = facts
    return summary


def _peers(name: str) -> list[str]:
    peers = ["copy-floor", "average-floor"]
    if name.startswith("orthomerge-"):
        peers.append("mergekit-" + name.removeprefix("orthomerge-").partition("-shards-")[0])
    return [peer for peer in peers if peer != name]


def targets(samples: Samples, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what was measured; ``met`` is None where a peer was left out."""
    found = []
    for method, (most, least) in _SPEED_TARGETS.items():
        own, peer = f"orthomerge-{method}", f"mergekit-{method}"
        floor = ratio(samples, own, "average-floor")
        memory = ratio(samples, own, peer, "peak_rss_bytes")
        found += [
            _target(f"{method}: wall time / average floor", floor, at_most=most),
            _target(f"{method}: mergekit's wall time / ours", ratio(samples, peer, own), least),
            _target(f"{method}: peak RSS / mergekit's", memory, at_most=0.5),
        ]
    peaks = [summary[name]["peak_rss_bytes"]["median"] for name in _SHARD_VARIANTS]
    spread = round(max(peaks) / min(peaks), 4)
    help_cpu = summary["orthomerge-help"]["cpu_seconds"]["median"]
    plan_wall = summary["orthomerge-plan"]["wall_seconds"]["median"]
    return [
        *found,
        _target("peak RSS, largest / smallest over shard sizes", spread, at_most=1.05),
        _target("CPU seconds of --help, median", help_cpu, at_most=0.4),
        _target("wall seconds of plan, median", plan_wall, at_most=1.0),
    ]


def _target(
    what: str, measured: float | None, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    met = None
    if measured is not None:
        met = (at_least is None or measured >= at_least) and (
            at_most is None or measured <= at_most
        )
    return {
        "target": what,
        "at_least": at_least,
        "at_most": at_most,
        "measured": measured,
        "met": met,
    }


def print_report(result: Mapping[str, Any]) -> None:
    """Print the figures and the targets as tables."""
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)  # a log file has no width of its own
    megabytes = result["inputs"]["bytes_per_model"] / 1e6
    table = Table(title=f"3 × {megabytes:.1f} MB in, one out; {result['rounds']} round(s)")
    table.add_column("contender", no_wrap=True)
    for title in ("wall s", "best", "CPU s", "RSS MB", "anon MB", "× copy", "× average", "× mk"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, facts in result["summary"].items():
        wall, cpu = facts["wall_seconds"], facts["cpu_seconds"]
        table.add_row(
            name,
            _number(wall["median"]),
            _number(wall["best"]),
            _number(cpu["median"]),
            _number(facts["peak_rss_bytes"]["median"], 1e-6, 0),
            _number(facts["peak_anonymous_bytes"]["median"], 1e-6, 0),
            *(_number(_wall_ratio(facts, peer)) for peer in ("copy-", "average-", "mergekit-")),
        )
    console.print(table)
    for row in result["targets"]:
        limit = f"<= {row['at_most']}" if row["at_least"] is None else f">= {row['at_least']}"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
        console.print(f"{verdict:12} {row['target']}: {_number(row['measured'])} ({limit})")


def _wall_ratio(facts: Mapping[str, Any], prefix: str) -> float | None:
    found = [r["wall_seconds"] for peer, r in facts["ratios"].items() if peer.startswith(prefix)]
    return found[0] if found else None


def _number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"
