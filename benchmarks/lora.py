"""Time merges of LoRA adapters against a floor and PEFT, and how they grow with the adapters.

Every sample is a process from start to exit; ratios are taken within a round. Where PEFT
decomposes dense matrices, one decoder layer is measured, once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lora_scaling
from circumstances import RESULTS, check_sources, machine, run_command, versions, write_result
from llama_lora import SHAPES, adapter_names
from llama_shaped import DATA
from lora_contenders import LoraContender, contenders, resolve
from lora_summary import growth, print_report, summarise, targets
from merge_speed import clean
from processes import (
    CommandFailed,
    Sample,
    child_environment,
    end_children_on_terminate,
    measure,
)

__all__ = ["main"]

_ADAPTERS = 8
_HERE = Path(__file__).resolve().parent
_NOTES = [
    "Wall time from start to exit of the process, CPU time of all its threads.",
    "A floor reads every byte of the adapters and writes a file of the output's size: of the sum of"
    " the ranks (lossless) or of one rank.",
    "orthomerge, PEFT's program and the floors wait until their output is on disk (fsync).",
    "orthomerge also hashes every input byte, checks for NaN, and reads its output back.",
    "PEFT's base model has layers of the right shapes without weights of their own.",
    "one-layer: one decoder layer instead of 32, measured once.",
    "error: relative Frobenius distance in fp64 from the weighted sum, or for svd from its best "
    "approximation of the adapters' rank, on two modules of layer 0.",
    "Scaling: one decoder layer in a process of its own, one thread; factors in memory; reading is "
    "from the page cache.",
]


class _Run:
    """The measurement: samples, errors and failures by contender."""

    def __init__(self, data: Path, measured: dict[str, str | None]) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self.quality: dict[str, dict[str, dict[str, float]]] = {}
        self.failures: dict[str, str] = {}
        self._data, self._measured = data, measured

    def sample(self, one: LoraContender) -> None:
        """Measure a contender once; what fails is left out from then on."""
        if one.name in self.failures or (one.once and one.name in self.samples):
            return
        folder = _folder(self._data, one.scale)
        clean(folder)
        print(f"  {one.name}", file=sys.stderr, flush=True)
        try:
            found = measure(resolve(one.command), folder, folder / "log.txt", child_environment())
        except CommandFailed as failure:
            self.failures[one.name] = str(failure).strip().splitlines()[-1]
        else:
            self.samples.setdefault(one.name, []).append(found)
            if one.name not in self.quality and not one.name.startswith("floor"):
                self.quality[one.name] = _quality(folder)
        clean(folder)
        check_sources(self._measured)


def _folder(data: Path, scale: str) -> Path:
    return (data / f"lora-{scale}").absolute()


def _quality(folder: Path) -> dict[str, dict[str, float]]:
    """Return how far the output is from the truths; in a process of its own, as it is large."""
    words = [*adapter_names(_ADAPTERS), "--output", "output"]
    command = [sys.executable, str(_HERE / "lora_quality.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def report(
    options: argparse.Namespace,
    order: list[LoraContender],
    run: _Run,
    scaling: dict[str, list[dict[str, Any]]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Return the result file's content."""
    shape = SHAPES[options.scale]
    summary = summarise(order, run.samples, run.quality)
    return {
        "benchmark": "lora",
        "command": run_command(),
        **facts,
        "seed": options.seed,
        "scale": options.scale,
        "inputs": {
            "adapters": _ADAPTERS,
            "rank": shape.rank,
            "layers": shape.layers,
            "parameters_per_adapter": shape.parameter_count,
            "bytes_per_adapter": 4 * shape.parameter_count,
        },
        "rounds": options.rounds,
        "notes": _NOTES,
        "commands": {one.name: " ".join(one.command) for one in order},
        "summary": summary,
        "targets": targets(summary, shape.layers),
        "failures": run.failures,
        "quality": run.quality,
        "scaling": scaling,
        "growth": growth(scaling),
        "samples": {name: [asdict(s) for s in runs] for name, runs in run.samples.items()},
    }


def parse() -> argparse.Namespace:
    """Return the options, defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", choices=SHAPES, default="full")
    parser.add_argument("--quick", action="store_true", help="tiny adapters, one round")
    parser.add_argument("--no-dense", action="store_true", help="leave out PEFT's dense SVDs")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters")
    parser.add_argument("--data", type=Path, default=DATA, help="where adapters and outputs go")
    parser.add_argument("--results", type=Path, help="result file")
    options = parser.parse_args()
    if options.quick:
        options.scale, options.rounds = "tiny", 1
    if options.results is None:
        full = options.scale == "full"
        options.results = RESULTS / "lora.json" if full else options.data / "lora-tiny.json"
    return options


def generate(options: argparse.Namespace, order: list[LoraContender]) -> None:
    """Write the adapters of every scale that is read, unless they are there."""
    for scale in dict.fromkeys(one.scale for one in order):
        folder = _folder(options.data, scale)
        words = ["--out", str(folder), "--scale", scale, "--seed", str(options.seed)]
        words += ["--adapters", str(_ADAPTERS)]
        subprocess.run([sys.executable, str(_HERE / "llama_lora.py"), *words], check=True)


def _with_peft() -> dict[str, str | None]:
    found = versions()
    try:
        return {**found, "peft": version("peft")}
    except PackageNotFoundError:
        return {**found, "peft": None}


def main() -> None:
    """Run as a program."""
    end_children_on_terminate()
    options = parse()
    order = contenders(options.scale, dense=not options.no_dense)
    generate(options, order)
    facts = {"machine": machine(), "versions": _with_peft()}
    run = _Run(options.data, facts["versions"])
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for one in order:
            run.sample(one)
    scaling: dict[str, list[dict[str, Any]]] = {}
    print("scaling", file=sys.stderr)
    for series, row in lora_scaling.run(quick=options.quick, seed=options.seed):
        scaling.setdefault(series, []).append(row)
    check_sources(facts["versions"])
    result = report(options, order, run, scaling, facts)
    write_result(options.results, result)
    print_report(result)
    print(f"written to {options.results}")


if __name__ == "__main__":
    main()
