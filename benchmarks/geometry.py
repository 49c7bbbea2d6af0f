"""Time and check polar factors, Procrustes fits and the rotation step of a layer.

The layer step is measured against the published recipe (one dense SVD and two solves per expert),
in turns within each round. Every case runs in this process; run it once per number of threads.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from circumstances import RESULTS, check_sources, machine, run_command, versions, write_result
from torch import Tensor

from orthomerge.linalg import (
    ProcrustesBase,
    apply_cayley,
    frobenius,
    full_precision,
    polar_factor,
    procrustes_right,
)

__all__ = ["main"]

EXPERTS = 3
METHODS = ("svd", "eigh", "newton", "qdwh", "quintic")
SHAPES = {
    "square": (1024, 1024),
    "tall": (2816, 1024),
    "wide": (1024, 2816),
    "widest": (1024, 4096),
}
QUICK_SHAPES = {"square": (32, 32), "tall": (48, 32), "wide": (16, 48), "widest": (16, 64)}
#: The reference's time divided by ours, at least; on a CPU and on an accelerator.
TARGETS = {"square": 1.0, "tall": 1.0, "wide": 2.5, "widest": 2.5}
ANCHORS = (1e-6, 1e-3)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix with orthonormal columns, float64."""
    G = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(G)[0]


def conditioned(o: int, n: int, kappa: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a matrix with singular values geometric from 1 to 1/kappa, and U V^T."""
    r = min(o, n)
    U, V = orthonormal(o, r, generator), orthonormal(n, r, generator)
    s = torch.logspace(0, -math.log10(kappa), r, dtype=torch.float64)
    return (U * s) @ V.mT, U @ V.mT


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Time the candidates in turns; return best, median and samples of each."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(round(seconds(run, device), 5))
    return {
        name: {"best_seconds": min(taken), "median_seconds": median(taken), "samples": taken}
        for name, taken in samples.items()
    }


@full_precision()
def reference_layer(W0: Tensor, Xs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Run the published recipe: dense SVDs, inverse Cayley by solve, R from A again."""
    eye = torch.eye(W0.shape[1], dtype=W0.dtype, device=W0.device)
    total, norms, residuals = torch.zeros_like(eye), 0.0, []
    for X in Xs:
        U, _, Vh = torch.linalg.svd(W0.mT @ X)
        R = U @ Vh
        A = torch.linalg.solve(R + eye, R - eye)
        A = (A - A.mT) / 2
        norms += float(torch.linalg.vector_norm(A))
        total += A
        residuals.append(X - W0 @ torch.linalg.solve(eye - A, eye + A))
    A = corrected(total, norms, len(Xs))
    return W0 @ torch.linalg.solve(eye - A, eye + A), residuals


@full_precision()
def own_layer(W0: Tensor, Xs: list[Tensor], anchor: float) -> tuple[Tensor, list[Tensor]]:
    """Run our step: fits on the rows' span, generators summed, one solve."""
    base = ProcrustesBase(W0)
    total, norms, residuals = None, 0.0, []
    for X in Xs:
        fit = procrustes_right(base, X, anchor=anchor)
        A = fit.generator()
        norms += float(torch.linalg.vector_norm(A))
        total = A if total is None else total.add_(A)
        residuals.append(X - fit.apply(W0))
    assert total is not None
    return apply_cayley(W0, corrected(total, norms, len(Xs))), residuals


def corrected(total: Tensor, norms: float, count: int) -> Tensor:
    """Scale the sum so that its norm is the mean norm."""
    return total * (norms / (count * float(torch.linalg.vector_norm(total))))


def layer_weights(
    shape: tuple[int, int], seed: int, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Return a base of condition 100 and experts 2 % away from it, float32."""
    generator = torch.Generator().manual_seed(seed)
    W0, _ = conditioned(*shape, 100.0, generator)
    Xs = []
    for _ in range(EXPERTS):
        D = torch.randn(shape, generator=generator, dtype=torch.float64)
        D *= 0.02 * torch.linalg.vector_norm(W0) / torch.linalg.vector_norm(D)
        Xs.append((W0 + D).float().to(device))
    return W0.float().to(device), Xs


def measure_polar(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure every polar method over sizes and dtypes."""
    for n in options.sizes:
        generator = torch.Generator().manual_seed(options.seed + n)
        M, exact = conditioned(n, n, 1e4, generator)
        for dtype in (torch.float32, torch.float64):
            X = M.to(device, dtype)
            # mypy: the literal is checked by polar_factor itself
            runs = {m: lambda m=m, X=X: polar_factor(X, m) for m in METHODS}  # type: ignore[misc]
            runs["plain-svd"] = lambda X=X: torch.linalg.svd(X)  # type: ignore[misc]
            times = interleaved(runs, options.rounds, device)
            for method in METHODS:
                R, report = polar_factor(X, method)
                times[method] |= {
                    "orthogonality": report.residual,
                    "fallbacks": report.fallbacks,
                    "error": float((R.double().cpu() - exact).abs().max()),
                }
            yield {"n": n, "dtype": str(dtype).removeprefix("torch."), "methods": times}


def layer_runs(
    W0: Tensor, Xs: list[Tensor], turned: dict[str, Tensor]
) -> dict[str, Callable[[], object]]:
    """Return what is timed for one layer; each step leaves its rotated weight in ``turned``."""

    def reference() -> None:
        turned["reference"] = reference_layer(W0, Xs)[0]

    def ours(anchor: float) -> Callable[[], None]:
        def run() -> None:
            turned[f"ours-{anchor:g}"] = own_layer(W0, Xs, anchor)[0]

        return run

    def fit(anchor: float) -> Callable[[], object]:
        return lambda: procrustes_right(W0, Xs[0], anchor=anchor)

    runs: dict[str, Callable[[], object]] = {"reference": reference}
    for anchor in ANCHORS:
        runs |= {f"ours-{anchor:g}": ours(anchor), f"fit-{anchor:g}": fit(anchor)}
    return runs


def measure_layers(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure the layer step and single fits over the shapes."""
    for name, shape in options.shapes.items():
        W0, Xs = layer_weights(shape, options.seed, device)
        turned: dict[str, Tensor] = {}
        runs = layer_runs(W0, Xs, turned)
        times = interleaved(runs, options.rounds, device)
        moved = {label: float(frobenius(W - W0) / frobenius(W0)) for label, W in turned.items()}
        fits = [procrustes_right(W0, Xs[0], anchor=anchor) for anchor in ANCHORS]
        yield (
            {
                "name": name,
                "shape": list(shape),
                "times": times,
                "reductions": [fit.reduction for fit in fits],
                "relative_move": moved,
                "reference_over_ours": {
                    f"{anchor:g}": round(
                        times["reference"]["best_seconds"]
                        / times[f"ours-{anchor:g}"]["best_seconds"],
                        3,
                    )
                    for anchor in ANCHORS
                },
            }
        )


def targets(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each target with what was measured."""
    return [
        {
            "target": f"{row['name']}: reference's time / ours, anchor {anchor}",
            "at_least": TARGETS[row["name"]],
            "measured": value,
            "met": value >= TARGETS[row["name"]],
        }
        for row in layers
        for anchor, value in row["reference_over_ours"].items()
    ]


def parse() -> argparse.Namespace:
    """Return the options, defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024, 2048])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny matrices, one round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="not needed here: nothing is kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "geometry.json")
    options = parser.parse_args()
    shapes = QUICK_SHAPES if options.quick else SHAPES
    options.shapes = {name: shapes[name] for name in options.shapes}
    if options.quick:
        options.rounds, options.sizes = 1, [16, 32]
    return options


def main() -> None:
    """Run as a program."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    measured = versions()
    facts = {"machine": machine(), "versions": measured, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    result: dict[str, Any] = {
        "benchmark": "geometry",
        "command": run_command(),
        **facts,
        "seed": options.seed,
        "experts": EXPERTS,
        "rounds": options.rounds,
        "layers": [],
        "polar": [],
        "targets": [],
    }
    for key, rows in (
        ("layers", measure_layers(options, device)),
        ("polar", measure_polar(options, device)),
    ):
        for row in rows:  # long runs keep what they have
            result[key].append(row)
            result["targets"] = targets(result["layers"])
            check_sources(measured)
            write_result(options.results, result)
    for row in result["targets"]:
        print(row)
    print(f"written to {options.results}")


if __name__ == "__main__":
    main()
