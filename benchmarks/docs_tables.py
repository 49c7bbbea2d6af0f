"""Write the tables of the documentation from the result files; `--check` only compares.

The pages' prose is written by hand. What stands between a pair of markers
``<!-- table: NAME -->`` and ``<!-- end -->`` comes from here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_tables import lora_growth, lora_made_by, lora_speed
from tasks.tables import method_table
from unlearning_real_tables import real_text_table

__all__ = ["main", "pages", "rendered"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_IMBALANCED = "task_merges_imbalanced.json"
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


def finetune_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per pair of real checkpoints and anchor."""
    rows = [
        "| pair | anchor | matrices | below 0.9 of noise | smallest | median "
        "| share of ‖D‖² explained | the same for noise |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for pair in result["pairs"].values():
        for anchor, found in pair["summary"].items():
            rows.append(
                f"| {pair['meaning']} | {anchor.removeprefix('anchor ')} | {found['layers']} "
                f"| {found['layers_below_0.9_of_noise']} "
                f"| {found['smallest_residual_over_noise']:.2f} "
                f"| {found['median_residual_over_noise']:.2f} "
                f"| {found['rotational_share']:.2f} | {found['noise_share']:.2f} |"
            )
    return rows


def finetune_merges(result: Mapping[str, Any]) -> list[str]:
    """Return one row per decoupled merge of the real fine-tune."""
    rows = [
        "| settings | layers rotated | tensors bit-equal to tsv-m | distance from tsv-m |",
        "|---|--:|--:|--:|",
    ]
    for merge in result["merges"]:
        settings = ", ".join(f"{k}: {v}" for k, v in merge["settings"].items()) or "default"
        rows.append(
            f"| {settings} | {merge['rotated_layers']} of {merge['layers']} "
            f"| {merge['tensors_equal_to_tsv_m']} of {merge['tensors']} "
            f"| {merge['distance_from_tsv_m']:.3f} |"
        )
    return rows


def layer_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per shape: the layer step against the published recipe."""
    rows = [
        "| layer | recipe s | ours s, anchor 1e-6 | × | ours s, anchor 1e-3 | × | target |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    targets = {t["target"].partition(":")[0]: t["at_least"] for t in result["targets"]}
    for row in result["layers"]:
        seconds = {name: found["best_seconds"] for name, found in row["times"].items()}
        cells = [f"{row['name']} {row['shape'][0]} × {row['shape'][1]}"]
        cells.append(f"{seconds['reference']:.2f}")
        for anchor in ("1e-06", "0.001"):
            cells += [
                f"{seconds[f'ours-{anchor}']:.2f}",
                f"{row['reference_over_ours'][anchor]:.2f}",
            ]
        rows.append("| " + " | ".join([*cells, f"≥ {targets[row['name']]:g}"]) + " |")
    return rows


def polar_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per size and dtype: seconds and error of every polar method."""
    methods = [name for name in result["polar"][0]["methods"] if name != "plain-svd"]
    rows = [
        "| n | dtype | plain SVD s | " + " | ".join(f"{m} s (error)" for m in methods) + " |",
        "|--:|---|--:|" + "--:|" * len(methods),
    ]
    for row in result["polar"]:
        found = row["methods"]
        cells = [
            f"{found[m]['best_seconds']:.3f} ({found[m]['error']:.0e})"
            + ("*" if found[m]["fallbacks"] else "")
            for m in methods
        ]
        plain = f"{found['plain-svd']['best_seconds']:.3f}"
        rows.append("| " + " | ".join([str(row["n"]), row["dtype"], plain, *cells]) + " |")
    return rows


def decoupled_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per contender of the whole-model merge."""
    rows = ["| contender | wall s | peak RSS MB | recipe's time / this |", "|---|--:|--:|--:|"]
    for name, seconds in result["wall_seconds"].items():
        memory = result["peak_rss_bytes"][name] * _UNITS["peak_rss_bytes"]
        ratio = result["recipe_over"].get(name)
        rows.append(f"| {name} | {seconds:.0f} | {memory:.0f} | {ratio:.2f} |")
    return rows


def made_by(result: Mapping[str, Any]) -> list[str]:
    """Return from what, where, with what and by which command a result was made."""
    inputs, notes = result.get("inputs"), result.get("notes", [])
    known = [f"{key.replace('_', ' ')} {value}" for key, value in result["machine"].items()]
    threads = f"; {result['threads']} thread(s) of torch" if "threads" in result else ""
    rounds = f"; {result['rounds']} round(s)" if "rounds" in result else ""
    tools = {**result["versions"], **(result.get("mergekit_versions") or {})}
    lines = [
        f"* Machine: {'; '.join(known)}{threads}{rounds}.",
        f"* Versions: {', '.join(f'{name} {version}' for name, version in tools.items())}.",
        f"* Command: `{result['command']}`.",
        *(f"* {note}" for note in notes),
    ]
    if inputs is None:
        return lines
    models = f"{inputs['models']} models of {inputs['parameters_per_model']:,} parameters"
    return [f"* Inputs: {models}, {inputs['bytes_per_model'] / 1e6:.1f} MB each in bf16.", *lines]


def peft_table(result: Mapping[str, Any]) -> list[str]:
    """Return one row per question to PEFT and orthomerge."""
    versions = list(result["peft"])
    rows = [
        "| what matters | asked | " + " | ".join(f"PEFT {v}" for v in versions) + " | orthomerge |",
        "|---|---|" + "--:|" * (len(versions) + 1),
    ]
    for row in result["cases"]:
        answers = [result["peft"][v]["answers"][row["name"]] for v in versions]
        cells = [_answer(answer) for answer in answers]
        ours = result["ours"][row["name"]]
        cells.append("refused" if "error" in ours else _answer(ours))
        rows.append("| " + " | ".join([row["defect"], row["asked"], *cells]) + " |")
    return rows


def _answer(answer: Mapping[str, Any]) -> str:
    if "error" in answer:
        return f"`{answer['error']}`"
    error = answer["relative_error"]
    return "exact" if error < 1e-6 else f"{error:.2g}" if error < 0.1 else f"{error:.2f}"


def _ratio(facts: Mapping[str, Any], prefix: str) -> str:
    found = [r["wall_seconds"] for peer, r in facts["ratios"].items() if peer.startswith(prefix)]
    return f"{found[0]:.2f}" if found and found[0] is not None else ""


def task_families(family: str, setting: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """Return what renders the methods of one family of the task benchmark."""
    return lambda result: method_table(result["families"][family], setting)


_TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]]]] = {
    "speed": ("merge_speed.json", speed_table),
    "targets": ("merge_speed.json", target_table),
    "exactness": ("merge_exactness.json", exactness_table),
    "circumstances": ("merge_speed.json", made_by),
    "geometry-layers": ("geometry.json", layer_table),
    "geometry-polar": ("geometry.json", polar_table),
    "geometry-made-by": ("geometry.json", made_by),
    "decoupled-merge": ("decoupled_merge.json", decoupled_table),
    "decoupled-made-by": ("decoupled_merge.json", made_by),
    "lora": ("lora.json", lora_speed),
    "lora-targets": ("lora.json", target_table),
    "lora-growth": ("lora.json", lora_growth),
    "lora-made-by": ("lora.json", lora_made_by),
    "peft-defects": ("peft_defects.json", peft_table),
    "peft-defects-made-by": ("peft_defects.json", made_by),
    "tasks-lora-untuned": ("task_merges.json", task_families("lora", "untuned")),
    "tasks-lora-tuned": ("task_merges.json", task_families("lora", "tuned")),
    "tasks-lora-made-by": ("task_merges.json", made_by),
    "tasks-imbalanced-untuned": (_IMBALANCED, task_families("lora_imb", "untuned")),
    "tasks-imbalanced-tuned": (_IMBALANCED, task_families("lora_imb", "tuned")),
    "tasks-imbalanced-made-by": (_IMBALANCED, made_by),
    "unlearning-real": ("unlearning_real.json", real_text_table),
    "unlearning-real-made-by": ("unlearning_real.json", made_by),
    "real-finetune": ("real_finetune.json", finetune_table),
    "real-finetune-merges": ("real_finetune.json", finetune_merges),
}


def pages() -> list[Path]:
    """Return the pages that hold a marked table."""
    every = sorted((ROOT / "docs").rglob("*.md"))
    return [path for path in every if "<!-- table:" in path.read_text("utf-8")]


def rendered(page: str) -> str:
    """Return the page with every marked table made anew from its result file."""

    def table(match: re.Match[str]) -> str:
        file, render = _TABLES[match[2]]
        result = json.loads((RESULTS / file).read_text("utf-8"))
        return match[1] + "\n".join(render(result)) + "\n" + match[3]

    return _MARKED.sub(table, page)


def main() -> int:
    """Run as a program; return 1 if ``--check`` finds a difference."""
    different = 0
    for path in pages():
        page = path.read_text("utf-8")
        current = rendered(page)
        different += page != current
        if "--check" not in sys.argv:
            path.write_text(current, "utf-8")
    return int(different > 0 and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
