"""What a comparison of low-rank updates holds: sizes, angles, overlaps, ranks, module by module.

Plain numbers only; how they are measured is in ``updates``, how they add up in ``update_totals``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Comparison", "ModuleComparison", "SideComparison", "TotalComparison"]

PerAdapter = tuple[float | None, ...]
Matrix = tuple[tuple[float, ...], ...]
Cosines = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class SideComparison:
    """The factors of one side, all adapters' A_i or all their B_i; None where nobody compares.

    Attributes:
        overlap: ``ρ = ‖off(G)‖_F / ‖blkdiag(G)‖_F`` of the balanced factors, G their Gram matrix in
            blocks of one adapter each: 0 where no two adapters use a common direction.
        even_overlap: ρ with every update scaled to one size: a quiet adapter that lies within a
            loud one does not show in ``overlap``, but here.
        principal_cosine: Mean cosine of the principal angles between two adapters' frames.
        chance: About what unrelated frames of these ranks have: ``√(r / d)``.
        overlap_before: ρ as the method found it, in its own gauge.
        overlap_after: ρ when the method had made the updates orthogonal.
        drift: How far the method moved the factors, relative to their size.
    """

    overlap: float | None = None
    even_overlap: float | None = None
    principal_cosine: float | None = None
    chance: float | None = None
    overlap_before: float | None = None
    overlap_after: float | None = None
    drift: float | None = None


class _Aligned:
    """What both comparisons say of the adapter that is served worst."""

    sum_alignment: PerAdapter
    alignment: PerAdapter | None

    @property
    def least_sum_alignment(self) -> float | None:
        """The lowest cosine of an adapter with the plain sum."""
        return min((c for c in self.sum_alignment if c is not None), default=None)

    @property
    def least_alignment(self) -> float | None:
        """The lowest cosine of an adapter with the merged update."""
        return min((c for c in self.alignment or () if c is not None), default=None)


@dataclass(frozen=True)
class ModuleComparison(_Aligned):
    """One module. Tuples have one entry per adapter; N adapters, shape [o, n].

    Attributes:
        name: Module path.
        shape: o output and n input features.
        ranks: r_i; 0 where an adapter lacks the module.
        weights: w_i.
        sizes: ``f_i = ‖D_i‖_F / √(o n)``; 0 where an adapter does not change it.
        shares: ``f_i² / Σ f_j²``.
        imbalance: Largest / smallest size of those that are not 0.
        mv: ``Var_i f_i / (mean_i f_i)²``, over those that are not 0.
        mv_columns: ``mean_j Var_i α_i[j] / (mean_i α_i[j])²``, α_i the column norms of D_i.
        mv_within: ``Var_j α_i[j] / (mean_j α_i[j])²`` of each adapter.
        cosines: ``cos(D_i, D_j)``.
        sum_alignment: ``cos(w_i D_i, Σ w_j D_j)``; None where one of them is 0.
        alignment: ``cos(w_i D_i, D)``, D what the method makes of them; None if that is unknown.
        A: The right factors, whose rows are directions of the input.
        B: The left factors, whose columns are directions of the output.
        effective_rank: ``exp(-Σ p ln p)``, ``p = σ² / Σ σ²`` the energies of D.
        rank: Rank it will be written with; None for a full checkpoint.
        energy: ``Σ_{k ≤ rank} σ_k² / Σ σ_k²``: what that rank keeps.
        scale: λ that the method uses here, if it has one.
        inner: ``<D_i, D_j>``.
        merged_inner: ``<D_i, D>``.
        merged_norm: ``‖D‖_F``.
        spectrum: σ, descending.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    sizes: tuple[float, ...]
    shares: PerAdapter
    imbalance: float | None
    mv: float | None
    mv_columns: float | None
    mv_within: PerAdapter
    cosines: Cosines
    sum_alignment: PerAdapter
    alignment: PerAdapter | None
    A: SideComparison
    B: SideComparison
    effective_rank: float | None = None
    rank: int | None = None
    energy: float | None = None
    scale: float | None = None
    inner: Matrix = field(default=(), repr=False)
    merged_inner: tuple[float, ...] | None = field(default=None, repr=False)
    merged_norm: float | None = field(default=None, repr=False)
    spectrum: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class TotalComparison(_Aligned):
    """All modules together.

    Sizes, cosines and energies are those of the whole updates, as if all modules were one vector;
    MV, overlaps, principal cosines, drifts and effective ranks are plain means over modules.

    Attributes:
        modules: Number of modules.
        sizes: ``f_i = √(Σ ‖D_i‖² / Σ o n)``.
        shares: ``f_i² / Σ f_j²``.
        imbalance: Largest / smallest size of those that are not 0.
        mv: Mean of the modules'.
        mv_columns: Mean of the modules'.
        mv_within: Mean of the modules', per adapter.
        cosines: ``cos(D_i, D_j)``.
        sum_alignment: ``cos(w_i D_i, Σ w_j D_j)``.
        alignment: ``cos(w_i D_i, D)``.
        A: Means over modules.
        B: Means over modules.
        effective_rank: Mean over modules.
        energy: Share of ``‖D‖²`` that the ranks keep.
        least_energy: The least share that a module keeps.
        scale: Least, median and greatest λ.
    """

    modules: int
    sizes: tuple[float, ...]
    shares: PerAdapter
    imbalance: float | None
    mv: float | None
    mv_columns: float | None
    mv_within: PerAdapter
    cosines: Cosines
    sum_alignment: PerAdapter
    alignment: PerAdapter | None
    A: SideComparison
    B: SideComparison
    effective_rank: float | None
    energy: float | None
    least_energy: float | None
    scale: tuple[float, float, float] | None


@dataclass(frozen=True)
class Comparison:
    """Everything measured of the updates of some adapters.

    Attributes:
        models: Origins of the adapters, in order.
        modules: The modules.
        total: All of them together.
    """

    models: tuple[str, ...]
    modules: tuple[ModuleComparison, ...]
    total: TotalComparison

    def as_dict(self) -> dict[str, Any]:
        """Return everything JSON-ready, without the sums that totals are made from."""
        facts = dataclasses.asdict(self)
        for module, found in zip(self.modules, facts["modules"], strict=True):
            for key in ("inner", "merged_inner", "merged_norm", "spectrum"):
                del found[key]
            found["least_sum_alignment"] = module.least_sum_alignment
            found["least_alignment"] = module.least_alignment
        facts["total"]["least_sum_alignment"] = self.total.least_sum_alignment
        facts["total"]["least_alignment"] = self.total.least_alignment
        return facts
