"""The geometry of skew-symmetric generators: angles, cosines, and the rotation they merge to.

Also the measuring of adapters that carry generators themselves and need no base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.rotated import RotationAdapter
from orthomerge.diagnostics.measurements import (
    ANGLE_EDGES,
    Cosines,
    LayerGeometry,
    MergedGeometry,
    ModelGeometry,
)
from orthomerge.errors import AdapterError
from orthomerge.linalg.blocks import align_blocks
from orthomerge.linalg.checks import frobenius, orthogonality
from orthomerge.linalg.logarithms import cayley_angles
from orthomerge.linalg.means import AlgebraSum
from orthomerge.linalg.rotations import cayley

__all__ = ["GeneratorMerge", "angle_facts", "cosines", "measure_module", "merge_generators"]


@dataclass(frozen=True)
class GeneratorMerge:
    """What the generators of one layer merge to.

    Attributes:
        generator: A_m.
        correction: The factor c; 0 where they are all zero or cancel.
        agreement: ``‖Σ A_i‖ / Σ ‖A_i‖``; None where all are zero.
        merged: The merged rotation.
    """

    generator: Tensor
    correction: float
    agreement: float | None
    merged: MergedGeometry


def merge_generators(generators: Sequence[Tensor]) -> GeneratorMerge:
    """Merge generators [n, n] or [nb, b, b] with equal weights and describe the rotation."""
    algebra = AlgebraSum()
    for A in generators:
        algebra.add(A)
    merged, report = algebra.merged()
    R = cayley(merged)
    facts = angle_facts(merged, _planes(merged))
    mean = math.fsum(report.norms) / len(report.norms)
    return GeneratorMerge(
        generator=merged,
        correction=report.factors[0],
        agreement=report.sum_norm / mean if mean else None,
        merged=MergedGeometry(
            generator_norm=report.merged_norm,
            largest_angle=facts["largest_angle"],
            mean_angle=facts["mean_angle"],
            obtuse_fraction=facts["obtuse_fraction"],
            orthogonality=orthogonality(R)[1],
            determinant=int(torch.linalg.slogdet(R).sign.prod()),
            least_one_plus_cosine=1 + math.cos(math.radians(facts["largest_angle"])),
        ),
    )


def angle_facts(A: Tensor, planes: int) -> dict[str, Any]:
    """Return the fields of ``ModelGeometry`` that describe angles.

    Args:
        A: Skew-symmetric, [n, n], [nb, b, b], or its part on a subspace.
        planes: Planes of the whole space; those that A does not mention do not turn.
    """
    found = cayley_angles(A).flatten().rad2deg() if A.numel() else A.new_zeros(0).double()
    edges = torch.tensor(ANGLE_EDGES, dtype=torch.float64, device=found.device)
    counts = torch.bincount(torch.bucketize(found, edges), minlength=len(edges)).tolist()
    counts[0] += planes - found.numel()
    counts[-2] += sum(counts[len(edges) :])  # 180 degrees, rounded up
    return {
        "largest_angle": float(found.max()) if found.numel() else 0.0,
        "mean_angle": float(found.sum()) / planes if planes else 0.0,
        "obtuse_fraction": float((found > 90).sum()) / planes if planes else 0.0,
        "angle_counts": tuple(counts[: len(edges)]),
    }


def cosines(tensors: Sequence[Tensor | None]) -> Cosines:
    """Return the cosines of the angles between tensors; None where one is zero or missing."""
    norms = [0.0 if X is None else float(frobenius(X.reshape(-1, X.shape[-1]))) for X in tensors]

    def cosine(i: int, j: int) -> float | None:
        X, Y = tensors[i], tensors[j]
        if X is None or Y is None or not norms[i] or not norms[j]:
            return None
        if i == j:
            return 1.0
        rows = (X * Y).sum(dim=-1).sum(dtype=torch.float64)
        return float(rows) / (norms[i] * norms[j])

    return tuple(tuple(cosine(i, j) for j in range(len(tensors))) for i in range(len(tensors)))


def measure_module(
    name: str, adapters: Sequence[RotationAdapter], device: str = "cpu"
) -> LayerGeometry:
    """Measure one module of adapters that rotate, from their generators alone.

    Raises:
        AdapterError: The adapters rotate different sides, or differently many features; or one
            is a reflection, which has no generator.
        NumericalError: A generator is not finite.
    """
    owners = [adapter if name in adapter.modules else None for adapter in adapters]
    own = [
        None if adapter is None else adapter.skew(name, torch.float64).to(device)
        for adapter in owners
    ]
    stack = iter(
        _aligned(name, [a for a in owners if a is not None], [A for A in own if A is not None])
    )
    aligned = [None if A is None else next(stack) for A in own]
    zero = torch.zeros_like(next(A for A in aligned if A is not None))
    merge = merge_generators([zero if A is None else A for A in aligned])
    models = tuple(
        None if adapter is None or A is None or B is None else _module(name, adapter, A, B)
        for adapter, A, B in zip(owners, own, aligned, strict=True)
    )
    return LayerGeometry(
        name=name,
        shape=tuple(zero.shape),
        models=models,
        base_norm=None,
        condition=None,
        correction=merge.correction,
        agreement=merge.agreement,
        generator_cosines=cosines(aligned),
        change_cosines=None,
        merged=merge.merged,
        energy=None,
    )


def _module(name: str, adapter: RotationAdapter, A: Tensor, aligned: Tensor) -> ModelGeometry:
    R = adapter.blocks(name, torch.float64)
    return ModelGeometry(
        generator_norm=float(torch.linalg.vector_norm(aligned)),
        orthogonality=orthogonality(R)[1],
        theta=float(torch.linalg.matrix_norm(A, 2).max()),
        **angle_facts(aligned, _planes(aligned)),
    )


def _aligned(name: str, adapters: Sequence[RotationAdapter], As: Sequence[Tensor]) -> Tensor:
    """Bring generators to one block size; those of one shared block fill what the others fill."""
    modules = [adapter.modules[name] for adapter in adapters]
    widths = {m.num_blocks * m.block_size for m in modules if not m.shared}
    sides = {m.side for m in modules}
    columns = next(iter(widths), math.lcm(*(m.block_size for m in modules)))
    unfit = any(columns % m.block_size for m in modules)
    if len(sides) > 1 or len(widths) > 1 or unfit:
        raise AdapterError(
            "the adapters' rotations of this module do not act on the same space",
            file=", ".join(adapter.origin for adapter in adapters),
            tensor=name,
            found=", ".join(f"{m.num_blocks} x {m.block_size}, {m.side}" for m in modules),
            remedy="Give adapters of one base; with --base they are compared as changes of it.",
        )
    return align_blocks(As, columns)


def _planes(A: Tensor) -> int:
    return (A.shape[0] if A.ndim == 3 else 1) * (A.shape[-1] // 2)
