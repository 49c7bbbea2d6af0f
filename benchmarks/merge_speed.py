"""Time whole merges: orthomerge, mergekit and two floors, in turns on the same files.

Every sample is a process from start to exit; ratios are taken within a round, because the machine
may be quicker in one round than in the next.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from circumstances import (
    RESULTS,
    check_sources,
    machine,
    mergekit_program,
    mergekit_versions,
    run_command,
    versions,
    write_result,
)
from contenders import (
    METHODS,
    OUTPUT,
    Contender,
    floors,
    generation,
    mergekit_merge,
    orthomerge_merge,
    resolve,
    start_up,
)
from llama_shaped import DATA, SHAPES
from processes import Sample, child_environment, end_children_on_terminate, measure
from rich.progress import track
from speed_summary import print_report, summarise, targets

__all__ = ["main"]

_TIMED = ("linear", "task-arithmetic", "ties")  # each reads three models
_NOTES = [
    "Wall time from start to exit of the process, CPU time of all its threads.",
    "orthomerge and the floors wait until their output is on disk (fsync); mergekit does not.",
    "Peak RSS counts mapped input pages, which the average floor and mergekit have and "
    "orthomerge has not; peak_anonymous_bytes leaves them out.",
    "orthomerge also hashes every input byte and checks it for NaN and infinity.",
    "Each output is removed and the disk synced before the next process starts.",
]


def contenders(with_mergekit: bool) -> list[Contender]:
    """Return everything that is measured, in the order of a round."""
    methods = [METHODS[name] for name in _TIMED]
    own = [orthomerge_merge(method) for method in methods]
    shards = [orthomerge_merge(METHODS["linear"], max_shard_size=s) for s in ("200MB", "5GB")]
    peers = [mergekit_merge(method) for method in methods] if with_mergekit else []
    return [*floors(), *own, *shards, *start_up(), *peers]


def run_round(
    order: Sequence[Contender],
    folder: Path,
    mergekit: str | None,
    label: str,
    measured: dict[str, str | None],
) -> dict[str, Sample]:
    """Measure every contender once."""
    samples = {}
    environment = child_environment()
    for contender in track(order, label, transient=True):
        contender.prepare(folder)
        clean(folder)
        command = resolve(contender.command, mergekit)
        samples[contender.name] = measure(command, folder, folder / "log.txt", environment)
        check_sources(measured)
    clean(folder)
    return samples


def clean(folder: Path) -> None:
    """Remove what the last process wrote, and let the disk come to rest."""
    for name in (OUTPUT, f"{OUTPUT}.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)
    os.sync()


def report(
    options: argparse.Namespace,
    order: Sequence[Contender],
    samples: dict[str, list[Sample]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Return the result file's content."""
    shape = SHAPES[options.scale]
    summary = summarise(samples)
    return {
        "benchmark": "merge_speed",
        "command": run_command(),
        **facts,
        "seed": options.seed,
        "scale": options.scale,
        "inputs": {
            "models": 3,
            "parameters_per_model": shape.parameter_count,
            "bytes_per_model": 2 * shape.parameter_count,
        },
        "rounds": len(next(iter(samples.values()))),
        "notes": _NOTES,
        "commands": {contender.name: " ".join(contender.command) for contender in order},
        "mergekit_configs": {c.name: c.config for c in order if c.config is not None},
        "summary": summary,
        "targets": targets(samples, summary),
        "samples": {name: [asdict(run) for run in runs] for name, runs in samples.items()},
    }


def parse() -> argparse.Namespace:
    """Return the options, defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", choices=SHAPES, default="full")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, no warm-up")
    parser.add_argument("--mergekit", metavar="PATH", help="mergekit-yaml of another environment")
    parser.add_argument("--seed", type=int, default=0, help="of the models")
    parser.add_argument("--data", type=Path, default=DATA, help="where models and outputs go")
    parser.add_argument("--results", type=Path, help="result file")
    options = parser.parse_args()
    if options.quick:
        options.scale, options.rounds = "tiny", 1
    if options.results is None:
        full = options.scale == "full"
        name = "merge_speed.json" if full else f"merge_speed-{options.scale}.json"
        options.results = (RESULTS if full else options.data) / name
    return options


def main() -> None:
    """Run as a program."""
    end_children_on_terminate()
    options = parse()
    mergekit = mergekit_program(options.mergekit)
    folder = (options.data / f"llama-{options.scale}").absolute()
    subprocess.run(generation(folder, options.scale, options.seed), check=True)
    order = contenders(mergekit is not None)
    measured = versions()
    facts = {
        "machine": machine(),
        "versions": measured,
        "mergekit_versions": mergekit_versions(mergekit),
    }
    if not options.quick:
        run_round(order, folder, mergekit, "warm-up", measured)
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in order}
    for number in range(options.rounds):
        label = f"round {number + 1} of {options.rounds}"
        for name, sample in run_round(order, folder, mergekit, label, measured).items():
            samples[name].append(sample)
        result = report(options, order, samples, facts)
        write_result(options.results, result)
    print_report(result)
    print(f"written to {options.results}")


if __name__ == "__main__":
    main()
