"""The rank of a merged adapter: given, or found from the merged modules' singular values.

Numbers only; where the values come from is ``settling``'s business.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orthomerge.errors import RecipeError

__all__ = ["RankRule", "parse_rank"]

_SPELLING = "a number, energy:SHARE (energy:0.99), parameters:COUNT, or null for lossless"


@dataclass(frozen=True, slots=True)
class RankRule:
    """How the ranks of a merged adapter are chosen.

    Attributes:
        kind: ``rank``: one number for all; ``energy``: per module the smallest that keeps a share
            of ``‖D‖_F²``; ``parameters``: the best use of a number of parameters over all modules.
        value: The number, share or count.
    """

    kind: Literal["rank", "energy", "parameters"]
    value: float

    @property
    def from_data(self) -> bool:
        """Whether the ranks depend on the merged values."""
        return self.kind != "rank"

    def ranks(
        self, spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int]
    ) -> dict[str, int]:
        """Return the rank of every module, at least 1.

        Args:
            spectra: Singular values of each merged module, descending.
            costs: Parameters per rank of each module, o + n.

        >>> RankRule("energy", 0.9).ranks({"q": [3.0, 1.0]}, {"q": 4})
        {'q': 1}
        >>> RankRule("parameters", 12).ranks({"q": [3.0, 2.0], "k": [1.0]}, {"q": 4, "k": 4})
        {'q': 2, 'k': 1}
        """
        if self.kind == "energy":
            return {name: _energy_rank(values, self.value) for name, values in spectra.items()}
        return _budget_ranks(spectra, costs, int(self.value))


def parse_rank(value: object) -> RankRule | None:
    """Read a rank as it is written in recipes and on the command line.

    Raises:
        RecipeError: It is none of ``8``, ``energy:0.99``, ``parameters:1000000``, null.

    >>> parse_rank("energy:0.99")
    RankRule(kind='energy', value=0.99)
    """
    if value is None:
        return None
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"(?:(energy|parameters):)?(\d+\.?\d*|\.\d+)", text)
    if match:
        kind, number = match[1] or "rank", float(match[2])
        whole = number.is_integer() and number >= 1
        if (kind == "energy" and 0 < number <= 1) or (kind != "energy" and whole):
            return RankRule(kind, number)  # type: ignore[arg-type]
    raise RecipeError("this is no rank", expected=_SPELLING, found=repr(value))


def _energy_rank(values: Sequence[float], share: float) -> int:
    total = sum(value**2 for value in values)
    kept = 0.0
    for rank, value in enumerate(values, start=1):
        kept += value**2
        if kept >= (share - 1e-12) * total:
            return rank
    return max(1, len(values))


def _budget_ranks(
    spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Spend the parameters where they keep the most energy each, one rank at a time.

    An expensive module may find no room after cheap ones, so this also starts from the largest
    rank that all modules can have; the choice that keeps more is returned.
    """
    least = sum(costs[name] for name in spectra)
    if least > budget:
        raise RecipeError(
            "so few parameters do not give every module rank 1",
            expected=f"parameters:{least} or more",
            found=f"parameters:{budget}",
        )
    starts = [dict.fromkeys(spectra, 1)]
    for rank in range(2, max((len(values) for values in spectra.values()), default=1) + 1):
        even = {name: min(rank, max(1, len(values))) for name, values in spectra.items()}
        if sum(costs[name] * r for name, r in even.items()) <= budget:
            starts = [starts[0], even]
    filled = [_filled(start, spectra, costs, budget) for start in starts]
    return max(filled, key=lambda ranks: _energy(ranks, spectra))


def _filled(
    ranks: Mapping[str, int],
    spectra: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """Return the ranks with what is left of the budget spent, the best rank per parameter first."""
    ranks, spent = dict(ranks), sum(costs[name] * rank for name, rank in ranks.items())
    heap: list[tuple[float, str]] = []

    def push(name: str) -> None:
        values = spectra[name]
        if ranks[name] < len(values) and values[ranks[name]] > 0:
            heapq.heappush(heap, (-(values[ranks[name]] ** 2) / costs[name], name))

    for name in ranks:
        push(name)
    while heap:  # values descend within a module, so its best next rank is always in the heap
        _, name = heapq.heappop(heap)
        if spent + costs[name] <= budget:
            spent += costs[name]
            ranks[name] += 1
            push(name)
    return ranks


def _energy(ranks: Mapping[str, int], spectra: Mapping[str, Sequence[float]]) -> float:
    return sum(value**2 for name, rank in ranks.items() for value in spectra[name][:rank])
