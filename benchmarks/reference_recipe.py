"""The published recipe of orthogonal-residual decoupling, layer by layer, as a program.

Global variant with averaged residuals, in float32 and from the formulas: per expert and weight
matrix one dense SVD of an n x n matrix and a solve for the generator; the rotation is made again
from the generator for the residual, as the published program does from its cache (which is left
out here: the generators stay in memory until their layer is done). Saves with one rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from floors import publish
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["merge_layer"]


def generator(W0: Tensor, W: Tensor) -> Tensor:
    """Return the inverse Cayley map of the rotation nearest to taking W0 to W."""
    U, _, Vh = torch.linalg.svd(W0.T @ W)
    R, eye = U @ Vh, torch.eye(W0.shape[1])
    A = torch.linalg.solve(R + eye, R - eye)
    return (A - A.T) / 2


def rotation(A: Tensor) -> Tensor:
    """Return the Cayley map of A."""
    eye = torch.eye(len(A))
    return torch.linalg.solve(eye - A, eye + A)


def merge_layer(name: str, W0: Tensor, experts: list[Tensor]) -> Tensor:
    """Return the merged tensor; only matrices are rotated."""
    if W0.ndim != 2 or "weight" not in name or "layernorm" in name:
        return W0 + sum(W - W0 for W in experts) / len(experts)
    As = [generator(W0, W) for W in experts]
    total = sum(As[1:], As[0])
    mean_norm = sum(float(torch.linalg.vector_norm(A)) for A in As) / len(As)
    merged = total * (mean_norm / float(torch.linalg.vector_norm(total)))
    residual = sum(W - W0 @ rotation(A) for W, A in zip(experts, As, strict=True)) / len(As)
    return W0 @ rotation(merged) + residual


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("experts", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    partial = options.output.with_name(options.output.name + ".partial")
    partial.mkdir(parents=True)
    for shard in sorted(options.base.glob("*.safetensors")):
        paths = [folder / shard.name for folder in (options.base, *options.experts)]
        base, *experts = [safe_open(path, framework="pt") for path in paths]
        merged = {}
        for name in base.keys():  # noqa: SIM118 - safe_open is no mapping
            W0 = base.get_tensor(name)
            tensors = [expert.get_tensor(name).float() for expert in experts]
            merged[name] = merge_layer(name, W0.float(), tensors).to(W0.dtype)
        save_file(merged, partial / shard.name, metadata={"format": "pt"})
    publish(partial, options.output)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
