"""One paragraph on what a comparison of updates means for merging them.

Thresholds are constants here and explained in docs/diagnose.md; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from orthomerge.diagnostics.interference import Comparison, SideComparison, TotalComparison

__all__ = [
    "IMBALANCED",
    "KEPT",
    "NO_OVERLAP",
    "SHARED",
    "UNEVEN_COLUMNS",
    "MergeVerdict",
    "judge_updates",
]

#: From this ratio of the loudest adapter to the quietest on, magnitudes matter.
IMBALANCED = 2.0
#: ... or from this relative variance of column magnitudes on.
UNEVEN_COLUMNS = 0.25
#: Below this overlap of both sides there is nothing to make orthogonal.
NO_OVERLAP = 0.1
#: Mean principal cosine above which the adapters share a frame; do-merging spares that side.
SHARED = 0.9
#: Share of the merged update below which a rank loses much.
KEPT = 0.9
#: Cosine of two updates from which on they repeat each other, or below whose negative they oppose.
_ALIKE, _OPPOSED = 0.9, -0.1
# Mean principal cosine, well above chance, from which on frames are called related.
_RELATED = 0.5

Shared = Literal["A", "B", "both"]


@dataclass(frozen=True)
class MergeVerdict:
    """What a comparison says.

    Attributes:
        decoupling_matters: Whether merging magnitudes apart from directions changes anything to
            speak of; None for fewer than two adapters that change anything.
        orthogonalising_matters: Whether the adapters overlap enough for it; None likewise.
        shared: The side whose frames are one frame that all adapters share.
        unchanged: Adapters that change nothing, by number from 1.
        text: The paragraph.
    """

    decoupling_matters: bool | None
    orthogonalising_matters: bool | None
    shared: Shared | None
    unchanged: tuple[int, ...]
    text: str


def judge_updates(comparison: Comparison) -> MergeVerdict:
    """Say in plain words what the measurements mean.

    Decoupling will not matter if the imbalance is below ``IMBALANCED`` and MV of columns below
    ``UNEVEN_COLUMNS``; orthogonalising will not if the overlaps of both sides, at equal sizes, are
    below ``NO_OVERLAP``.

    Args:
        comparison: The measurements.
    """
    total = comparison.total
    unchanged = tuple(at for at, f in enumerate(total.sizes, 1) if f == 0)
    several = len(total.sizes) - len(unchanged) > 1
    decoupling = _decoupling_matters(total) if several else None
    overlaps = [s.even_overlap for s in (total.A, total.B) if s.even_overlap is not None]
    orthogonalising = any(rho >= NO_OVERLAP for rho in overlaps) if overlaps else None
    shared = _shared(total)
    said = [*_on_unchanged(unchanged)]
    if several:
        said += _on_sizes(total, bool(decoupling))
        said += _on_pairs(total)
        said += _on_overlap(total, bool(orthogonalising), shared)
    else:
        said.append("Fewer than two adapters change anything: nothing can interfere.")
    said += _on_rank(comparison)
    return MergeVerdict(decoupling, orthogonalising, shared, unchanged, " ".join(said))


def _decoupling_matters(total: TotalComparison) -> bool:
    even = (total.imbalance or 1.0) < IMBALANCED
    return not (even and (total.mv_columns or 0.0) < UNEVEN_COLUMNS)


def _shared(total: TotalComparison) -> Shared | None:
    A, B = ((side.principal_cosine or 0.0) > SHARED for side in (total.A, total.B))
    return ("both" if B else "A") if A else "B" if B else None


def _on_unchanged(unchanged: tuple[int, ...]) -> Iterator[str]:
    if unchanged:
        which = ", ".join(map(str, unchanged))
        noun = "Adapter" if len(unchanged) == 1 else "Adapters"
        verb = "changes" if len(unchanged) == 1 else "change"
        yield f"{noun} {which} {verb} nothing (untrained?)."


def _on_sizes(total: TotalComparison, matters: bool) -> Iterator[str]:
    ratio, columns = total.imbalance or 1.0, total.mv_columns or 0.0
    if not matters:
        yield (
            f"The adapters are about equally loud (imbalance {ratio:.2f}, MV of columns "
            f"{columns:.2f}): decoupling (decouple_strength) will not matter."
        )
    elif ratio < IMBALANCED:
        yield (
            f"The adapters are about equally loud as a whole (imbalance {ratio:.2f}) but not "
            f"column by column (MV of columns {columns:.2f}): decouple_strength would give them "
            f"more equal say in each column. {_TRADE}"
        )
    else:
        yield from _on_imbalance(total, ratio)


_TRADE = (
    "Expect it to move accuracy from the loud tasks to the quiet ones; whether the mean gains "
    "differs from case to case, so measure it."
)


def _on_imbalance(total: TotalComparison, ratio: float) -> Iterator[str]:
    loud = max(range(len(total.sizes)), key=lambda at: total.sizes[at])
    quiet = min((at for at, f in enumerate(total.sizes) if f > 0), key=lambda at: total.sizes[at])
    share = total.shares[loud] or 0.0
    part = f"{share:.1%}" if share <= 0.999 else "over 99.9%"
    yield (
        f"Adapter {loud + 1} is {ratio:.3g} times as loud as adapter {quiet + 1} and holds {part} "
        f"of the energy{_sum_words(total, loud, quiet)}."
    )
    yield f"decouple_strength would trade loud for quiet. {_TRADE}"
    yield "Weights (--weight) are the other lever."


def _sum_words(total: TotalComparison, loud: int, quiet: int) -> str:
    own, other = total.sum_alignment[loud], total.sum_alignment[quiet]
    if own is None or other is None:
        return ""
    return f"; the plain sum has cosine {own:.2f} with it and {other:.2f} with adapter {quiet + 1}"


def _on_pairs(total: TotalComparison) -> Iterator[str]:
    pairs = [
        (value, i + 1, j + 1)
        for i, row in enumerate(total.cosines)
        for j, value in enumerate(row[:i])
        if value is not None
    ]
    if not pairs:
        return
    low, high = min(pairs), max(pairs)
    if high[0] > _ALIKE:
        yield (
            f"Adapters {high[2]} and {high[1]} are nearly the same update (cosine {high[0]:.2f}): "
            "a plain sum counts it twice."
        )
    if low[0] < _OPPOSED:
        yield f"Adapters {low[2]} and {low[1]} oppose each other (cosine {low[0]:.2f})."


def _on_overlap(total: TotalComparison, matters: bool, shared: Shared | None) -> Iterator[str]:
    A, B = total.A, total.B
    if A.even_overlap is None or B.even_overlap is None:
        yield "No module is changed by two adapters: they do not interfere."
        return
    overlaps = f"ρ_A {A.even_overlap:.2f}, ρ_B {B.even_overlap:.2f} at equal size"
    if not matters:
        yield f"They hardly overlap ({overlaps}): orthogonalising is a no-op."
        return
    if shared is None:
        usual = all(_unrelated(side) for side in (A, B))
        as_chance = ", as unrelated adapters of such ranks do" if usual else ""
        yield (
            f"They overlap ({overlaps}){as_chance}: orthogonalising (do-merging, tsv-m) changes "
            "the merge; it also takes away what the tasks truly share."
        )
    yield from _on_frames(total, shared)


def _on_frames(total: TotalComparison, shared: Shared | None) -> Iterator[str]:
    sides = {"A": total.A, "B": total.B}
    if shared == "both":
        yield (
            f"All share one A frame and one B frame ({_cosines(total.A)}; {_cosines(total.B)}): "
            "they differ within the same directions, and do-merging acts on both sides."
        )
    elif shared is not None:
        other = "B" if shared == "A" else "A"
        why = ", as adapters trained from one initialisation do" if shared == "A" else ""
        yield (
            f"All share one {shared} frame ({_cosines(sides[shared])}){why}: making the {shared}_i "
            "orthogonal would destroy what they have in common, so do-merging leaves them alone "
            f"and acts on {other} only."
        )
    else:
        for name, side in sides.items():
            if not _unrelated(side) and (side.principal_cosine or 0.0) > _RELATED:
                yield f"Their {name} frames are related ({_cosines(side)})."


def _unrelated(side: SideComparison) -> bool:
    return (side.principal_cosine or 0.0) < 2 * (side.chance or 0.0)


def _cosines(side: SideComparison) -> str:
    return f"mean principal cosine {side.principal_cosine:.2f}, chance {side.chance:.2f}"


def _on_rank(comparison: Comparison) -> Iterator[str]:
    total = comparison.total
    if total.energy is None or total.least_energy is None:
        return
    worst = min(
        (module for module in comparison.modules if module.energy is not None),
        key=lambda module: module.energy or 0.0,
    )
    if total.energy < KEPT or total.least_energy < KEPT:
        yield (
            f"The rank asked for keeps {total.energy:.0%} of the merged update, and "
            f"{total.least_energy:.0%} in {worst.name}: a higher --rank loses less."
        )
