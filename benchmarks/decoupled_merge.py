"""Time a decoupled merge of whole models against the published recipe, process by process.

Three models (a base and two experts) of the scale asked for; every sample is a process from start
to exit. The recipe takes long, so one round is the default.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from circumstances import (
    RESULTS,
    check_sources,
    machine,
    run_command,
    versions,
    write_result,
)
from contenders import OUTPUT, Contender, generation, orthomerge_command, resolve
from llama_shaped import DATA, SHAPES
from merge_speed import clean
from processes import Sample, child_environment, end_children_on_terminate, measure
from rich.console import Console
from rich.table import Table

__all__ = ["main"]

_RECIPE = "reference_recipe.py"
_NOTES = [
    "recipe: dense float32 SVD and two solves per expert, three solves per layer, no checks.",
    "faithful: the same merge by orthomerge (every layer rotated, residuals averaged).",
    "robust: orthomerge's default (anchor 1e-3, gate, TSV-M of the residuals).",
    "orthomerge hashes every input byte, checks for NaN and makes its output durable.",
]


def contenders() -> list[Contender]:
    """Return what is measured, in the order of a round."""
    own = {
        "tsv-m": ("--method", "tsv-m"),
        "robust": ("--method", "orthomerge"),
        "faithful": ("--method", "orthomerge", "--set", "mode=faithful"),
        "geodesic": (),
    }
    found = []
    for name, extra in own.items():
        base = ("--base", "base") if name != "geodesic" else ()
        models = ("fine-tune-1", "fine-tune-2", *base)
        command = (*orthomerge_command(), "merge", *models, *extra, "--output", OUTPUT)
        found.append(Contender(f"orthomerge-{name}", command))
    recipe = ("python", _RECIPE, "base", "fine-tune-1", "fine-tune-2", "--output", OUTPUT)
    return [*found, Contender("recipe", recipe)]


def report(
    options: argparse.Namespace, samples: dict[str, list[Sample]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Return the result file's content."""
    shape = SHAPES[options.scale]
    best = {name: min(run.wall_seconds for run in runs) for name, runs in samples.items()}
    rss = {name: max(run.peak_rss_bytes for run in runs) for name, runs in samples.items()}
    return {
        "benchmark": "decoupled_merge",
        "command": run_command(),
        **facts,
        "scale": options.scale,
        "inputs": {
            "models": 3,
            "parameters_per_model": shape.parameter_count,
            "bytes_per_model": 2 * shape.parameter_count,
        },
        "rounds": options.rounds,
        "notes": _NOTES,
        "commands": {c.name: " ".join(c.command) for c in contenders()},
        "wall_seconds": best,
        "peak_rss_bytes": rss,
        "recipe_over": {name: best["recipe"] / seconds for name, seconds in best.items()}
        if "recipe" in best
        else {},
        "samples": {name: [asdict(run) for run in runs] for name, runs in samples.items()},
    }


def main() -> None:
    """Run as a program."""
    end_children_on_terminate()
    parser = argparse.ArgumentParser(description=__doc__)
    names = [contender.name for contender in contenders()]
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scale", choices=SHAPES, default="full")
    parser.add_argument("--seed", type=int, default=0, help="of the models")
    parser.add_argument("--data", type=Path, default=DATA, help="where models and outputs go")
    parser.add_argument("--results", type=Path, help="result file")
    options = parser.parse_args()
    full = options.scale == "full"
    if options.results is None:
        name = "decoupled_merge.json" if full else f"decoupled_merge-{options.scale}.json"
        options.results = (RESULTS if full else options.data) / name
    folder = (options.data / f"llama-{options.scale}").absolute()
    subprocess.run(generation(folder, options.scale, options.seed), check=True)
    facts = {"machine": machine(), "versions": versions()}
    samples: dict[str, list[Sample]] = {}
    for _ in range(options.rounds):
        for contender in contenders():
            if contender.name not in options.contenders:
                continue
            clean(folder)
            program = str(Path(__file__).parent / _RECIPE)
            command = [program if w == _RECIPE else w for w in resolve(contender.command, None)]
            found = measure(command, folder, folder / "log.txt", child_environment())
            check_sources(facts["versions"])
            samples.setdefault(contender.name, []).append(found)
    clean(folder)
    write_result(options.results, report(options, samples, facts))
    show(samples)


def show(samples: dict[str, list[Sample]]) -> None:
    """Print the samples."""
    table = Table(title="decoupled merge of whole models")
    for column in ("contender", "wall s", "CPU s", "peak RSS MB"):
        table.add_column(column)
    for name, runs in samples.items():
        for run in runs:
            table.add_row(
                name,
                f"{run.wall_seconds:.1f}",
                f"{run.cpu_seconds:.1f}",
                f"{run.peak_rss_bytes / 1e6:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
