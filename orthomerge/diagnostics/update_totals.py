"""Add up the comparisons of modules: whole updates as if all modules were one vector.

What has no such sum (overlaps, angles of frames, MV) is averaged over modules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from orthomerge.diagnostics.interference import (
    Comparison,
    Matrix,
    ModuleComparison,
    PerAdapter,
    SideComparison,
    TotalComparison,
)
from orthomerge.diagnostics.update_numbers import alignment, shares, size_ratio, update_cosines
from orthomerge.errors import NumericalError

__all__ = ["compared"]


def compared(models: Sequence[str], modules: Sequence[ModuleComparison]) -> Comparison:
    """Put the comparisons of all modules together.

    Args:
        models: Origins of the adapters, in the order of every module's entries.
        modules: The modules, at least one.

    Raises:
        NumericalError: There is no module, or one with another number of adapters.
    """
    counts = {len(module.sizes) for module in modules}
    if counts != {len(models)}:
        raise NumericalError(
            "every module must be compared over all adapters",
            expected=len(models),
            found=sorted(counts),
        )
    count, elements = len(models), sum(math.prod(module.shape) for module in modules)
    inner = _sum_matrices([module.inner for module in modules], count)
    squares = [inner[at][at] for at in range(count)]
    sizes = tuple(math.sqrt(square / elements) for square in squares)
    energies = [(m.energy, math.fsum(s * s for s in m.spectrum)) for m in modules]
    known = [(energy, size) for energy, size in energies if energy is not None]
    scales = [module.scale for module in modules if module.scale is not None]
    total = TotalComparison(
        modules=len(modules),
        sizes=sizes,
        shares=shares(sizes),
        imbalance=size_ratio(sizes),
        mv=_mean(module.mv for module in modules),
        mv_columns=_mean(module.mv_columns for module in modules),
        mv_within=tuple(_mean(m.mv_within[at] for m in modules) for at in range(count)),
        cosines=update_cosines(inner),
        sum_alignment=_sum_alignment(modules, squares),
        alignment=_alignment(modules, squares),
        A=_side([module.A for module in modules]),
        B=_side([module.B for module in modules]),
        effective_rank=_mean(module.effective_rank for module in modules),
        energy=_weighted(known),
        least_energy=min((energy for energy, _ in known), default=None),
        scale=(min(scales), statistics.median(scales), max(scales)) if scales else None,
    )
    return Comparison(tuple(models), tuple(modules), total)


def _sum_alignment(modules: Sequence[ModuleComparison], squares: Sequence[float]) -> PerAdapter:
    """Return ``cos(w_i D_i, Σ w_j D_j)`` over all modules; weights may differ between them."""
    products, norms = [], []
    for module in modules:
        rows = [
            math.fsum(w * x for w, x in zip(module.weights, row, strict=True))
            for row in module.inner
        ]
        products.append(rows)
        norms.append(math.fsum(w * p for w, p in zip(module.weights, rows, strict=True)))
    return _aligned(modules, products, math.fsum(norms), squares)


def _alignment(modules: Sequence[ModuleComparison], squares: Sequence[float]) -> PerAdapter | None:
    products, norms = [], []
    for module in modules:
        if module.merged_inner is None or module.merged_norm is None:
            return None
        products.append(module.merged_inner)
        norms.append(module.merged_norm**2)
    return _aligned(modules, products, math.fsum(norms), squares)


def _aligned(
    modules: Sequence[ModuleComparison],
    products: Sequence[Sequence[float]],
    norm: float,
    squares: Sequence[float],
) -> PerAdapter:
    """Sum products with the signs of the modules' weights, so that a task to subtract aligns."""
    count = len(squares)
    signs = [[math.copysign(1.0, w) if w else 0.0 for w in module.weights] for module in modules]
    totals = [
        math.fsum(sign[at] * row[at] for sign, row in zip(signs, products, strict=True))
        for at in range(count)
    ]
    weights = [max(abs(module.weights[at]) for module in modules) for at in range(count)]
    return alignment(totals, squares, math.sqrt(max(0.0, norm)), weights)


def _side(sides: Sequence[SideComparison]) -> SideComparison:
    return SideComparison(
        overlap=_mean(side.overlap for side in sides),
        even_overlap=_mean(side.even_overlap for side in sides),
        principal_cosine=_mean(side.principal_cosine for side in sides),
        chance=_mean(side.chance for side in sides),
        overlap_before=_mean(side.overlap_before for side in sides),
        overlap_after=_mean(side.overlap_after for side in sides),
        drift=_mean(side.drift for side in sides),
    )


def _sum_matrices(matrices: Sequence[Matrix], count: int) -> list[list[float]]:
    return [
        [math.fsum(matrix[i][j] for matrix in matrices) for j in range(count)] for i in range(count)
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _weighted(values: Sequence[tuple[float, float]]) -> float | None:
    total = math.fsum(size for _, size in values)
    return math.fsum(value * size for value, size in values) / total if total else None
