"""Plain numbers of updates: ratios, variances, cosines and energies, from norms and inner products.

Nothing here knows what an update is; the inner products come from ``updates``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from orthomerge.diagnostics.interference import Cosines, PerAdapter

__all__ = [
    "alignment",
    "effective_rank",
    "kept_energy",
    "relative_variance",
    "shares",
    "size_ratio",
    "update_cosines",
]

_CANCELLED = 1e-7  # of a sum, relative to the norms of what was added up: it has no direction


def kept_energy(spectrum: Sequence[float], rank: int) -> float | None:
    """Return which share of ``Σ σ²`` the largest singular values hold; None of nothing.

    >>> kept_energy([3.0, 4.0][::-1], 1)
    0.64
    """
    total = math.fsum(s * s for s in spectrum)
    return math.fsum(s * s for s in spectrum[:rank]) / total if total else None


def effective_rank(spectrum: Sequence[float]) -> float | None:
    """Return ``exp(-Σ p ln p)`` with ``p = σ² / Σ σ²``: r for r equal values, 1 for one.

    >>> round(effective_rank([2.0, 2.0, 0.0]), 9)
    2.0
    """
    total = math.fsum(s * s for s in spectrum)
    if not total:
        return None
    energies = [s * s / total for s in spectrum if s > 0]
    return math.exp(-math.fsum(p * math.log(p) for p in energies if p > 0))


def relative_variance(values: Sequence[float]) -> float | None:
    """Return the population variance over the squared mean; None of fewer than two values.

    >>> relative_variance([1.0, 3.0])
    0.25
    """
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    if mean <= 0:
        return None
    return math.fsum((value - mean) ** 2 for value in values) / len(values) / mean**2


def shares(sizes: Sequence[float]) -> PerAdapter:
    """Return ``f_i² / Σ f_j²``; None of nothing."""
    total = math.fsum(f * f for f in sizes)
    return tuple(f * f / total if total else None for f in sizes)


def size_ratio(sizes: Sequence[float]) -> float | None:
    """Return the largest size over the smallest of those not 0; None if fewer than two are."""
    live = [f for f in sizes if f > 0]
    return max(live) / min(live) if len(live) > 1 else None


def update_cosines(inner: Sequence[Sequence[float]]) -> Cosines:
    """Return the cosines of the angles between vectors of given inner products."""
    norms = [math.sqrt(max(0.0, inner[at][at])) for at in range(len(inner))]
    return tuple(
        tuple(_cosine(value, norms[i], norms[j]) for j, value in enumerate(row))
        for i, row in enumerate(inner)
    )


def alignment(
    products: Sequence[float], squares: Sequence[float], norm: float, weights: Sequence[float]
) -> PerAdapter:
    """Return ``cos(w_i D_i, D)`` from ``<D_i, D>``, ``‖D_i‖²`` and ``‖D‖``.

    None where an update or its weight is 0, or all have cancelled.
    """
    scale = math.fsum(abs(w) * math.sqrt(q) for w, q in zip(weights, squares, strict=True))
    norm = norm if norm > _CANCELLED * scale else 0.0
    return tuple(
        _cosine(p if w > 0 else -p, math.sqrt(q), norm) if w else None
        for p, q, w in zip(products, squares, weights, strict=True)
    )


def _cosine(product: float, left: float, right: float) -> float | None:
    if left <= 0 or right <= 0:
        return None
    return max(-1.0, min(1.0, product / left / right))
