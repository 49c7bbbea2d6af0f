"""Compare the low-rank updates that several adapters make to one module, never multiplied out.

``D_i = B_i A_i``. Everything but the column norms is decided on the Gram matrices ``B^T B`` and
``A A^T`` of all adapters' factors side by side, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orthomerge.diagnostics.interference import ModuleComparison, PerAdapter, SideComparison
from orthomerge.diagnostics.update_numbers import (
    alignment,
    effective_rank,
    kept_energy,
    relative_variance,
    shares,
    size_ratio,
    update_cosines,
)
from orthomerge.errors import NumericalError
from orthomerge.linalg.block_diagonals import blocks_times, diagonal_blocks
from orthomerge.linalg.factors import Factors, balancing, concatenated, gram, singular_values
from orthomerge.linalg.orthogonal_stacks import mean_principal_cosine, whitened_stack
from orthomerge.linalg.precision import full_precision

__all__ = ["compare_updates", "with_rank"]

_NEGLIGIBLE = 1e-7  # ||B A|| relative to ||B|| ||A|| below which an update is rounding
_ZERO_COLUMN = 1e-8  # relative to the root mean square of an update's columns


@full_precision()
def compare_updates(
    name: str,
    factors: Sequence[Factors | None],
    *,
    weights: Sequence[float] | None = None,
    merged: Factors | None = None,
    facts: Mapping[str, Any] | None = None,
    scale: float | None = None,
) -> ModuleComparison:
    """Compare the updates of one module, and what a method has made of them.

    Args:
        name: Module path, for reports.
        factors: B_i [o, r_i], A_i [r_i, n]; None for an adapter that lacks the module.
        weights: w_i; 1 each by default.
        merged: What the method makes of them; None if that is not known.
        facts: What the method measured: ``overlap_A_before``, ``overlap_A_after``, ``drift_A``,
            and the same of B.
        scale: λ of the method.

    Raises:
        NumericalError: No adapter has the module, or there is not one weight each.

    >>> one = Factors(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0, 4.0]]))
    >>> ten = Factors(torch.tensor([[0.0], [1.0]]), torch.tensor([[30.0, 40.0]]))
    >>> found = compare_updates("up", [one, ten])
    >>> round(found.imbalance, 6), [round(c, 6) for c in found.sum_alignment]
    (10.0, [0.099504, 0.995037])
    """
    given, present = _checked(name, factors, weights)
    stack = _Stack.of([F for _, F in present])
    places = [at for at, _ in present]
    inner = _spread(stack.inner, places, len(factors))
    size = math.sqrt(math.prod(stack.shape))
    sizes = tuple(math.sqrt(inner[at][at]) / size for at in range(len(factors)))
    columns = _column_norms(present, stack.live)
    module = ModuleComparison(
        name=name,
        shape=stack.shape,
        ranks=tuple(F.rank if F is not None else 0 for F in factors),
        weights=given,
        sizes=sizes,
        shares=shares(sizes),
        imbalance=size_ratio(sizes),
        mv=relative_variance([f for f in sizes if f > 0]),
        mv_columns=_mean_column_variance(list(columns.values())),
        mv_within=tuple(
            relative_variance(columns[at].tolist()) if at in columns else None
            for at in range(len(factors))
        ),
        cosines=update_cosines(inner),
        sum_alignment=_sum_alignment(inner, given),
        alignment=None,
        A=stack.side("A", facts or {}),
        B=stack.side("B", facts or {}),
        scale=scale,
        inner=tuple(map(tuple, inner)),
    )
    return module if merged is None else _with_merged(module, stack, merged, places)


def _checked(
    name: str, factors: Sequence[Factors | None], weights: Sequence[float] | None
) -> tuple[tuple[float, ...], list[tuple[int, Factors]]]:
    """Return the weights, and the factors of those that have the module with their places."""
    given = tuple(map(float, weights)) if weights is not None else (1.0,) * len(factors)
    if len(given) != len(factors):
        raise NumericalError("one weight per adapter", expected=len(factors), found=len(given))
    present = [(at, F) for at, F in enumerate(factors) if F is not None and F.rank]
    if not present:
        raise NumericalError("no adapter changes this module", tensor=name)
    return given, present


def _with_merged(
    module: ModuleComparison, stack: _Stack, merged: Factors, places: Sequence[int]
) -> ModuleComparison:
    """Add what a method has made of the updates: alignment and spectrum."""
    count = len(module.inner)
    products = _spread_row(stack.inner_with(merged), places, count)
    squares = [module.inner[at][at] for at in range(count)]
    norm, spectrum = merged.norm().item(), tuple(singular_values(merged).tolist())
    return replace(
        module,
        alignment=alignment(products, squares, norm, module.weights),
        effective_rank=effective_rank(spectrum),
        merged_inner=products,
        merged_norm=norm,
        spectrum=spectrum,
    )


def with_rank(module: ModuleComparison, rank: int | None) -> ModuleComparison:
    """Return the comparison with the rank the merged update will be written with."""
    energy = None if rank is None else kept_energy(module.spectrum, rank)
    return replace(module, rank=rank, energy=energy)


def _sum_alignment(inner: Sequence[Sequence[float]], weights: Sequence[float]) -> PerAdapter:
    products = [math.fsum(w * x for w, x in zip(weights, row, strict=True)) for row in inner]
    square = math.fsum(w * p for w, p in zip(weights, products, strict=True))
    squares = [inner[at][at] for at in range(len(inner))]
    return alignment(products, squares, math.sqrt(max(0.0, square)), weights)


@dataclass(frozen=True)
class _Stack:
    """All adapters' factors side by side, and their Gram matrices [R, R] in float64."""

    factors: Factors
    ranks: list[int]
    left: Tensor  # B^T B
    right: Tensor  # A A^T
    live: list[bool]  # which updates are more than rounding

    @classmethod
    def of(cls, parts: Sequence[Factors]) -> _Stack:
        joined = concatenated(parts)
        ranks = [part.rank for part in parts]
        left, right = gram(joined.B.mT), gram(joined.A)
        sizes = [_traces(G, ranks) for G in (left, right)]
        squares = _block_sums(left * right, ranks, ranks).diagonal()
        live = squares > _NEGLIGIBLE**2 * sizes[0] * sizes[1]
        return cls(joined, ranks, left, right, live.tolist())

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape

    @property
    def inner(self) -> Tensor:
        """``<D_i, D_j> = tr(B_i^T B_j · A_j A_i^T)``; 0 for updates that are rounding."""
        return _block_sums(self.left * self.right, self.ranks, self.ranks) * self._alive(both=True)

    def inner_with(self, merged: Factors) -> Tensor:
        """``<D, D_i>`` of each update."""
        left = merged.B.double().mT @ self.factors.B.double()
        right = merged.A.double() @ self.factors.A.double().mT
        return _block_sums(left * right, [merged.rank], self.ranks)[0] * self._alive()

    def side(self, side: str, facts: Mapping[str, Any]) -> SideComparison:
        """Return overlap and angles of one side's factors, in the balanced gauge."""
        found = {
            "overlap_before": facts.get(f"overlap_{side}_before"),
            "overlap_after": facts.get(f"overlap_{side}_after"),
            "drift": facts.get(f"drift_{side}"),
        }
        method = {key: None if value is None else float(value) for key, value in found.items()}
        if sum(self.live) < 2:
            return SideComparison(**method)
        G, ranks = self._balanced(side)
        d = self.factors.shape[0 if side == "B" else 1]
        squares = _block_sums(G.square(), self.ranks, self.ranks)
        live = torch.tensor(self.live, device=G.device)
        squares = squares[live][:, live]
        own = squares.diagonal().sqrt()  # ||D_i||, as balanced factors have Gram matrices S_i
        return SideComparison(
            overlap=_overlap(squares),
            even_overlap=_overlap(squares / (own[:, None] * own)),
            principal_cosine=mean_principal_cosine(
                whitened_stack(G, self.ranks), self.ranks
            ).item(),
            chance=_chance(ranks, d),
            **method,
        )

    def _balanced(self, side: str) -> tuple[Tensor, list[int]]:
        """Return the Gram matrix of balanced factors, 0 for what does not live, and the ranks."""
        left, right = (diagonal_blocks(G, self.ranks) for G in (self.left, self.right))
        X, Y, S = balancing(left, right)
        T = (Y if side == "A" else X.mT) * self._alive()[:, None, None]
        half = blocks_times(T, self.right if side == "A" else self.left, self.ranks)
        ranks = (S > 0).sum(-1).tolist()
        live = [rank * alive for rank, alive in zip(ranks, self.live, strict=True)]
        return blocks_times(T, half.mT, self.ranks), live

    def _alive(self, *, both: bool = False) -> Tensor:
        live = torch.tensor(self.live, dtype=self.left.dtype, device=self.left.device)
        return live[:, None] * live if both else live


def _overlap(squares: Tensor) -> float:
    """Return ``‖off(G)‖_F / ‖blkdiag(G)‖_F`` from the squared norms of the blocks of G."""
    inside = squares.diagonal().sum()
    overlap: float = ((squares.sum() - inside).clamp(min=0) / inside).sqrt().item()
    return overlap


def _chance(ranks: Sequence[int], d: int) -> float | None:
    """Return the mean over pairs of ``√(max(r_i, r_j) / d)``, as the cosines are averaged."""
    live = [r for r in ranks if r]
    pairs = [(a, b) for at, a in enumerate(live) for b in live[at + 1 :]]
    count = sum(min(pair) for pair in pairs)
    total = math.fsum(min(pair) * math.sqrt(min(1.0, max(pair) / d)) for pair in pairs)
    return total / count if count else None


def _block_sums(K: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Return the sum of the entries of every block."""
    strips = [strip.sum(0) for strip in torch.split(K, list(rows), 0)]
    return torch.stack(
        [
            torch.stack([part.sum() for part in torch.split(strip, list(columns))])
            for strip in strips
        ]
    )


def _traces(G: Tensor, ranks: Sequence[int]) -> Tensor:
    return torch.stack([part.sum() for part in torch.split(G.diagonal(), list(ranks))])


def _column_norms(
    present: Sequence[tuple[int, Factors]], live: Sequence[bool]
) -> dict[int, Tensor]:
    """Return the norms of every column of the updates that are not 0, in float64."""
    rows = zip(present, live, strict=True)
    return {at: F.column_norms().double() for (at, F), lives in rows if lives}


def _mean_column_variance(columns: Sequence[Tensor]) -> float | None:
    """Return the mean over columns of the relative variance over adapters; zero columns are out."""
    if len(columns) < 2:
        return None
    alpha = torch.stack(list(columns))
    floor = _ZERO_COLUMN * alpha.square().mean(-1).sqrt().amax()
    mean = alpha.mean(0)
    variance = (alpha - mean).square().mean(0)
    kept = mean > floor
    if not bool(kept.any()):
        return None
    value: float = (variance[kept] / mean[kept].square()).mean().item()
    return value


def _spread(inner: Tensor, places: Sequence[int], count: int) -> list[list[float]]:
    """Put rows and columns of those present where they belong; 0 elsewhere."""
    rows = [[0.0] * count for _ in range(count)]
    for i, values in zip(places, inner.tolist(), strict=True):
        for j, value in zip(places, values, strict=True):
            rows[i][j] = max(0.0, value) if i == j else value
    return rows


def _spread_row(values: Tensor, places: Sequence[int], count: int) -> tuple[float, ...]:
    row = [0.0] * count
    for at, value in zip(places, values.tolist(), strict=True):
        row[at] = value
    return tuple(row)
