"""The tables of the documentation that the result of ``lora.py`` fills."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["lora_growth", "lora_made_by", "lora_speed"]

_SUFFIX = "-one-layer"


def lora_speed(result: Mapping[str, Any]) -> list[str]:
    """Return one row per contender."""
    rows = [
        "| contender | wall s | CPU s | RSS MB | × floor | error | distance from the sum |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    layers = result["inputs"]["layers"]
    for name, facts in result["summary"].items():
        wall = f"{facts['wall_seconds']:.1f}"
        if name.endswith(_SUFFIX):
            wall += f" (× {layers}: {layers * facts['wall_seconds']:.0f})"
        rows.append(
            f"| {name} | {wall} | {facts['cpu_seconds']:.1f} "
            f"| {facts['peak_rss_bytes'] / 1e6:.0f} | {_number(facts['over_floor'], '.2f')} "
            f"| {_number(facts['error'], '.0e')} | {_number(facts['distance_from_sum'], '.3f')} |"
        )
    rows += [f"| {name} | failed: {why} | | | | | |" for name, why in result["failures"].items()]
    return rows


def lora_growth(result: Mapping[str, Any]) -> list[str]:
    """Return one row per point of every series."""
    rows = [
        "| method | adapters | rank | hidden | ms per module | × reading | memory MB "
        "| factors of the largest module MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for series in result["scaling"].values():
        rows += [
            f"| {row['method']} | {row['adapters']} | {row['rank']} | {row['hidden']} "
            f"| {1e3 * row['seconds_per_module']:.1f} | {row['merge_over_read']:.0f} "
            f"| {row['peak_growth_bytes'] / 1e6:.0f} | {row['largest_factors_bytes'] / 1e6:.1f} |"
            for row in series
        ]
    return rows


def lora_made_by(result: Mapping[str, Any]) -> list[str]:
    """Return the inputs and circumstances."""
    inputs = result["inputs"]
    size = inputs["bytes_per_adapter"] / 1e6
    known = [f"{key.replace('_', ' ')} {value}" for key, value in result["machine"].items()]
    return [
        f"* Inputs: {inputs['adapters']} adapters of rank {inputs['rank']}, {inputs['layers']} "
        f"layers, {size:.1f} MB each in fp32.",
        f"* Machine: {'; '.join(known)}; {result['rounds']} round(s).",
        f"* Versions: {', '.join(f'{k} {v}' for k, v in result['versions'].items())}.",
        f"* Command: `{result['command']}`.",
        *(f"* {note}" for note in result["notes"]),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
