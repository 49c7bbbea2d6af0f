"""Write the tables of docs/performance.md from the result files; `--check` only compares.

The page's prose is written by hand. What stands between a pair of markers
``<!-- table: NAME -->`` and ``<!-- end -->`` comes from here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["main", "rendered"]

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_UNITS = {"wall_seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1e-6}


def speed_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per contender."""
    rows = [
        "| contender | wall s, median (best) | CPU s | RSS MB | × average floor | × mergekit |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, facts in result["summary"].items():
        wall = facts["wall_seconds"]
        rows.append(
            f"| {name} | {wall['median']:.1f} ({wall['best']:.1f}) "
            f"| {facts['cpu_seconds']['median']:.1f} "
            f"| {facts['peak_rss_bytes']['median'] * _UNITS['peak_rss_bytes']:.0f} "
            f"| {_ratio(facts, 'average-')} | {_ratio(facts, 'mergekit-')} |"
        )
    return rows


def target_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per target."""
    rows = ["| target | limit | measured | |", "|---|--:|--:|---|"]
    for target in result["targets"]:
        low, high = target["at_least"], target["at_most"]
        limit = f"≤ {high:g}" if low is None else f"≥ {low:g}"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
        measured = "" if target["measured"] is None else f"{target['measured']:.2f}"
        rows.append(f"| {target['target']} | {limit} | {measured} | {verdict} |")
    return rows


def exactness_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per method and tool."""
    rows = [
        "| method | tool | not correctly rounded | … and not by fp32 near a midpoint "
        "| error | error if rounded once |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for method, facts in result["methods"].items():
        for tool, found in facts["tools"].items():
            other = found["not_correctly_rounded_by_cause"]["other"] / found["elements"]
            rows.append(
                f"| {method} | {tool} | {found['share_not_correctly_rounded']:.4%} | {other:.4%} "
                f"| {found['relative_error']:.4f} | {found['relative_error_rounded_once']:.4f} |"
            )
    return rows


def circumstances(result: Mapping[str, Any]) -> list[str]:
    """Return where, when with what, and by which command the numbers were made."""
    machine, inputs = result["machine"], result["inputs"]
    known = [f"{key.replace('_', ' ')} {value}" for key, value in machine.items()]
    tools = {**result["versions"], **(result["mergekit_versions"] or {})}
    megabytes = inputs["bytes_per_model"] / 1e6
    return [
        f"* Inputs: {inputs['models']} models of {inputs['parameters_per_model']:,} parameters, "
        f"{megabytes:.1f} MB each in bf16; {result['rounds']} rounds after a warm-up.",
        f"* Machine: {'; '.join(known)}.",
        f"* Versions: {', '.join(f'{name} {version}' for name, version in tools.items())}.",
        f"* Command: `{result['command']}`.",
        *(f"* {note}" for note in result["notes"]),
    ]


def _ratio(facts: Mapping[str, Any], prefix: str) -> str:
    found = [r["wall_seconds"] for peer, r in facts["ratios"].items() if peer.startswith(prefix)]
    return f"{found[0]:.2f}" if found and found[0] is not None else ""


_TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]]]] = {
    "speed": ("merge_speed.json", speed_table),
    "targets": ("merge_speed.json", target_table),
    "exactness": ("merge_exactness.json", exactness_table),
    "circumstances": ("merge_speed.json", circumstances),
}


def rendered(page: str) -> str:
    """Return the page with every marked table made anew from its result file."""

    def table(match: re.Match[str]) -> str:
        file, render = _TABLES[match[2]]
        result = json.loads((RESULTS / file).read_text("utf-8"))
        return match[1] + "\n".join(render(result)) + "\n" + match[3]

    return _MARKED.sub(table, page)


def main() -> int:
    """Run as a program; return 1 if ``--check`` finds a difference."""
    page = PAGE.read_text("utf-8")
    current = rendered(page)
    if "--check" in sys.argv:
        return int(page != current)
    PAGE.write_text(current, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
