"""Time merging of one decoder layer's factors by their number, rank and hidden size.

Every point is a process of its own (``--point``), so that its peak memory is its own. Time is per
module, and also relative to reading the same factors from a file that is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_lora import SHAPES, LoraShape, factors

__all__ = ["Point", "main", "points", "run"]

_METHODS = ("do-merging", "ties", "svd")
_REPEATS = 2


@dataclass(frozen=True)
class Point:
    """What is merged, and how."""

    method: str
    adapters: int
    rank: int
    hidden: int

    def shape(self) -> LoraShape:
        """Return Llama-3.1-8B's layer, all its dimensions scaled with the hidden size."""
        layer, by = SHAPES["layer"], self.hidden / SHAPES["layer"].hidden
        inner, keys = int(layer.intermediate * by), int(layer.keys * by)
        return replace(
            layer, hidden=self.hidden, intermediate=inner, keys=keys, layers=1, rank=self.rank
        )


def points(*, quick: bool) -> dict[str, list[Point]]:
    """Return the points of each series."""
    hidden = 64 if quick else SHAPES["layer"].hidden
    methods = ("do-merging", "svd") if quick else _METHODS
    counts, ranks = ((2, 4), (4, 8)) if quick else ((2, 4, 8, 16, 32), (8, 16, 32, 64, 128))
    sizes = (hidden, 2 * hidden) if quick else (hidden // 4, hidden // 2, hidden, 2 * hidden)
    return {
        "adapters": [Point(m, n, 16, hidden) for m in methods for n in counts],
        "rank": [Point(m, 4, r, hidden) for m in methods for r in ranks],
        "hidden": [Point(m, 4, 16, h) for m in methods for h in sizes],
    }


def measure_point(point: Point, seed: int) -> dict[str, Any]:
    """Merge every module of the layer; return seconds per module and the memory it took."""
    import torch

    from orthomerge.linalg.factors import Factors

    torch.set_num_threads(1)  # as each of the engine's workers has
    merged, read, modules = 0.0, 0.0, point.shape().modules()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, dims in modules.items():
        drawn = [factors(name, dims, point.rank, i, seed) for i in range(point.adapters)]
        held = [Factors(B, A) for B, A in drawn]
        read += _seconds_to_read([tensor.contiguous().numpy().data for f in drawn for tensor in f])
        times = []
        with torch.inference_mode():
            for _ in range(_REPEATS):
                started = time.perf_counter()
                _merge(point, held)
                times.append(time.perf_counter() - started)
        merged += min(times)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **asdict(point),
        "seconds_per_module": merged / len(modules),
        "read_seconds_per_module": read / len(modules),
        "merge_over_read": merged / read,
        "largest_factors_bytes": 4 * point.adapters * point.rank * max(map(sum, modules.values())),
        "peak_growth_bytes": (after - before) * 1024,
    }


def _merge(point: Point, held: list[Any]) -> None:
    from orthomerge.linalg.factors import truncated
    from orthomerge.merging.lora.lifting import merge_factors
    from orthomerge.merging.registry import get_method

    method = get_method("task-arithmetic" if point.method == "svd" else point.method)
    defaults = {name: one.default for name, one in method.parameters.items()}
    result = merge_factors(method, held, weights=[1.0] * len(held), **defaults)
    if point.method != "do-merging":
        truncated(result.tensor, point.rank)


def _seconds_to_read(arrays: list[memoryview]) -> float:
    """Return the least time to read the factors, into one buffer for each tensor."""
    with tempfile.TemporaryFile(buffering=0) as file:
        for array in arrays:
            file.write(array)
        times = []
        for _ in range(_REPEATS):
            file.seek(0)
            started = time.perf_counter()
            for array in arrays:
                file.readinto(bytearray(array.nbytes))
            times.append(time.perf_counter() - started)
    return min(times)


def run(*, quick: bool, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure every point in a process of its own; yield its series and what was found."""
    for series, every in points(quick=quick).items():
        for point in every:
            given = json.dumps({**asdict(point), "seed": seed})
            command = [sys.executable, __file__, "--point", given]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            yield series, json.loads(done.stdout)


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--point", required=True, help="the point as JSON")
    given = json.loads(parser.parse_args().point)
    seed = given.pop("seed")
    print(json.dumps(measure_point(Point(**given), seed)))


if __name__ == "__main__":
    main()
