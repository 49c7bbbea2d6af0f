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
    """Spend the parameters where they keep the most energy each, one rank at a time."""
    ranks = dict.fromkeys(spectra, 1)
    spent = sum(costs[name] for name in ranks)
    if spent > budget:
        raise RecipeError(
            "so few parameters do not give every module rank 1",
            expected=f"parameters:{spent} or more",
            found=f"parameters:{budget}",
        )
    # Values descend within a module, so the best next rank is always on top of the heap.
    heap = [(-(s[1] ** 2) / costs[n], n) for n, s in spectra.items() if len(s) > 1 and s[1] > 0]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        if spent + costs[name] > budget:
            continue
        spent += costs[name]
        ranks[name] += 1
        values = spectra[name]
        if ranks[name] < len(values) and values[ranks[name]] > 0:
            heapq.heappush(heap, (-(values[ranks[name]] ** 2) / costs[name], name))
    return ranks
