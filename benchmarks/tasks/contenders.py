"""The merge methods that are compared: data, so that a new one is one line.

An entry whose method is not in the catalogue of this version of orthomerge is left out of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONTENDERS", "GRID", "REFERENCES", "START", "Contender", "available", "walk"]

#: Strengths that are tried: the size of the whole update, relative to that of the plain sum.
GRID = (0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5)

#: Where the search on the grid begins.
START = 0.6

#: What every other method is compared with.
REFERENCES = ("task-arithmetic", "tsv-m")


@dataclass(frozen=True)
class Contender:
    """One merge method at one setting.

    Args:
        method: Id in orthomerge's catalogue, or a combination type of PEFT.
        parameters: What differs from the method's defaults.
        maker: ``orthomerge`` or ``peft``.
        dense: Merge full matrices, not adapters, as methods of full checkpoints are published.
        tuned: Whether to look for its best strength; not where its update points the same way
            as another contender's.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    maker: str = "orthomerge"
    dense: bool = False
    tuned: bool = True


#: Every contender by the name it has in the results. Methods of task vectors work on adapters in
#: KnOTS coordinates, so that ``ties`` is KnOTS-TIES; ``ties-dense`` is TIES as published.
CONTENDERS: dict[str, Contender] = {
    "task-arithmetic": Contender("task-arithmetic"),
    "linear": Contender("linear", tuned=False),  # task arithmetic / number of experts
    "ties": Contender("ties"),
    "ties-dense": Contender("ties", dense=True),
    "dare": Contender("dare"),
    "dare-ties": Contender("dare-ties"),
    "dare-ties-dense": Contender("dare-ties", dense=True),
    "della": Contender("della"),
    "magnitude-prune": Contender("magnitude-prune"),
    "core-ties": Contender("core", {"op": "ties"}),
    "core-iso-c": Contender("core", {"op": "iso-c"}),
    "tsv-m": Contender("tsv-m"),
    "iso-c": Contender("iso-c"),
    "iso-c-dense": Contender("iso-c", dense=True),
    "iso-cts": Contender("iso-cts"),
    "pico": Contender("pico"),
    "norm-cap": Contender("norm-cap"),
    "do-merging": Contender("do-merging"),
    "do-merging-p1": Contender("do-merging", {"decouple_strength": 1.0}),
    "do-merging-paper": Contender("do-merging", {"preset": "paper"}),
    "peft-linear": Contender("linear", maker="peft"),
}


def available(names: Sequence[str]) -> dict[str, Contender]:
    """Return the named contenders that this version of orthomerge has the method of.

    Raises:
        SystemExit: There is no contender of that name.
    """
    from orthomerge.merging.registry import all_methods

    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown:
        raise SystemExit(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    known = all_methods()
    chosen = {name: CONTENDERS[name] for name in names}
    return {n: c for n, c in chosen.items() if c.maker == "peft" or c.method in known}


def walk(losses: Mapping[float, float]) -> float | None:
    """Return the next strength to try: a search downhill on ``GRID`` from ``START``.

    Args:
        losses: What was found at the strengths tried so far.

    Returns:
        None when the best strength has both its neighbours tried.
    """
    if START not in losses:
        return START
    place = GRID.index(min(losses, key=lambda strength: (losses[strength], strength)))
    neighbours = [GRID[i] for i in (place - 1, place + 1) if 0 <= i < len(GRID)]
    return next((strength for strength in neighbours if strength not in losses), None)
