"""Compare merged models with an fp64 oracle, element by element, for orthomerge and mergekit.

All 1-D tensors and a seeded sample of the matrices are looked at. The sample always has the
embedding, the largest tensor.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
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
from comparison import Comparison, Truth
from contenders import (
    METHODS,
    OUTPUT,
    Contender,
    Method,
    generation,
    mergekit_merge,
    orthomerge_merge,
    resolve,
)
from fp64_oracle import ORACLES, share_at_threshold, step, undecided_elections
from llama_shaped import DATA, SHAPES
from processes import child_environment, end_children_on_terminate, measure
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

__all__ = ["main"]

_TABLE_WIDTH = 120
_EMBEDDING = "model.embed_tokens.weight"
_NOTES = [
    "An element counts as not correctly rounded if it differs from the fp64 result rounded once "
    "to bf16, to nearest, ties to even.",
    "Causes: the fp64 result lies within one fp32 step of the middle of two bf16 values; the sign "
    "election of ties cancels to less than fp32 resolves, so that fp64 is no judge either; other.",
    "The ulp distance counts bf16 values between result and oracle; it is large wherever a result "
    "cancels to nearly zero. Input ulps divide by the bf16 step at the element's largest input, "
    "where 0.5 is the least; the decided ones leave out undecided elections.",
    "Relative errors are divided by ‖fp64 result - first source‖, the change the merge makes.",
    "mergekit is told dtype: bfloat16, as in most published configurations; with dtype: float32 "
    "and out_dtype: bfloat16 it would round less often.",
    "ties: entries equal to the threshold are kept; mergekit keeps exactly k entries and works on "
    "bf16 deltas, so part of its difference is another choice among equal or nearly equal entries.",
    "slerp: mergekit interpolates linearly where the cosine exceeds 0.9995, which it does here.",
]


class Model:
    """A folder of safetensors files, read with the safetensors library."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        handles = [safe_open(path, framework="pt") for path in files]
        self._where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor


def compare_method(
    method: Method, outputs: dict[str, Model], inputs: dict[str, Model], names: Sequence[str]
) -> dict[str, Any]:
    """Compare every tool's output of one method with the oracle."""
    found = {tool: Comparison() for tool in outputs}
    at_threshold = []
    for name in names:
        base = inputs[method.base][name] if method.base else None
        models = [inputs[model][name] for model in method.models]
        settings = method.settings
        at_threshold.append(share_at_threshold(base, models, settings))
        everything = models if base is None else [base, *models]
        truth = Truth(
            exact=ORACLES[method.name](base, models, method.weights, **settings),
            origin=everything[0],
            inputs_step=step(torch.stack([values.abs() for values in everything]).amax(0)),
            undecided=undecided_elections(base, models, method.weights, **settings),
        )
        for tool, output in outputs.items():
            found[tool].add(output[name], truth)
    return {
        "weights": list(method.weights),
        "settings": method.settings,
        "largest_share_at_threshold": max(at_threshold),
        "tools": {tool: comparison.facts() for tool, comparison in found.items()},
    }


def merged_outputs(
    method: Method, folder: Path, mergekit: str | None
) -> Iterator[tuple[str, Model]]:
    """Run each tool and yield its name and its output."""
    tools: list[tuple[str, Contender]] = [("orthomerge", orthomerge_merge(method))]
    if mergekit:
        tools.append(("mergekit", mergekit_merge(method)))
    for tool, contender in tools:
        contender.prepare(folder)
        shutil.rmtree(folder / OUTPUT, ignore_errors=True)
        command = resolve(contender.command, mergekit)
        measure(command, folder, folder / "log.txt", child_environment())
        kept = folder / f"{OUTPUT}-{tool}"
        shutil.rmtree(kept, ignore_errors=True)
        (folder / OUTPUT).rename(kept)
        yield tool, Model(kept)


def sampled_names(scale: str, count: int, seed: int) -> list[str]:
    """Return all 1-D tensors, the embedding, and ``count`` other matrices."""
    shapes = SHAPES[scale].tensors()
    vectors = [name for name, dims in shapes.items() if len(dims) == 1]
    others = [name for name, dims in shapes.items() if len(dims) > 1 and name != _EMBEDDING]
    chosen = random.Random(seed).sample(others, min(count, len(others)))
    return [*vectors, _EMBEDDING, *sorted(chosen)]


def print_report(result: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    table = Table(title=f"against fp64, rounded once; {len(result['tensors'])} tensors")
    for title in ("method", "tool"):
        table.add_column(title, no_wrap=True)
    for title in (
        "wrong",
        "midpoint",
        "undecided",
        "other",
        "ulps",
        "input ulps",
        "error",
        "least",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for method, facts in result["methods"].items():
        for tool, figures in facts["tools"].items():
            causes = figures["not_correctly_rounded_by_cause"].values()
            table.add_row(
                method,
                tool,
                f"{figures['share_not_correctly_rounded']:.5%}",
                *(f"{count / figures['elements']:.5%}" for count in causes),
                str(figures["largest_ulp_distance"]),
                f"{figures['largest_decided_error_in_input_ulps']:.3f}",
                f"{figures['relative_error']:.5f}",
                f"{figures['relative_error_rounded_once']:.5f}",
            )
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)  # a log file has no width of its own
    console.print(table)


def parse() -> argparse.Namespace:
    """Return the options, defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=SHAPES, default="full")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--matrices", type=int, default=12, help="how many are sampled")
    parser.add_argument("--mergekit", metavar="PATH", help="mergekit-yaml of another environment")
    parser.add_argument("--seed", type=int, default=0, help="of the models and of the sample")
    parser.add_argument("--data", type=Path, default=DATA, help="where models and outputs go")
    parser.add_argument("--results", type=Path, help="result file")
    options = parser.parse_args()
    if options.quick:
        options.scale = "tiny"
    if options.results is None:
        full = options.scale == "full"
        name = "merge_exactness.json" if full else f"merge_exactness-{options.scale}.json"
        options.results = (RESULTS if full else options.data) / name
    return options


def main() -> None:
    """Run as a program."""
    end_children_on_terminate()
    options = parse()
    mergekit = mergekit_program(options.mergekit)
    folder = (options.data / f"llama-{options.scale}").absolute()
    subprocess.run(generation(folder, options.scale, options.seed), check=True)
    names = sampled_names(options.scale, options.matrices, options.seed)
    inputs = {name: Model(folder / name) for m in METHODS.values() for name in m.models}
    methods, measured = {}, versions()
    with torch.inference_mode():
        for method in METHODS.values():
            print(f"{method.name} ...", flush=True)
            outputs = dict(merged_outputs(method, folder, mergekit))
            methods[method.name] = compare_method(method, outputs, inputs, names)
            for tool in outputs:
                shutil.rmtree(folder / f"{OUTPUT}-{tool}")
    check_sources(measured)
    result = {
        "benchmark": "merge_exactness",
        "command": run_command(),
        "machine": machine(),
        "versions": measured,
        "mergekit_versions": mergekit_versions(mergekit),
        "seed": options.seed,
        "scale": options.scale,
        "notes": _NOTES,
        "tensors": names,
        "methods": methods,
    }
    write_result(options.results, result)
    print_report(result)
    print(f"written to {options.results}")


if __name__ == "__main__":
    main()
