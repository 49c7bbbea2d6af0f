"""What an observer of a merge sees of one LoRA module: its factors before and after.

Plain data; ``run.observe_plan`` runs the merge for it, without writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthomerge.linalg.factors import Factors
    from orthomerge.merging.plan import Task

__all__ = ["MergedModule"]


@dataclass(frozen=True)
class MergedModule:
    """One module before and after its merge. What it holds is not kept after the observer returns.

    Attributes:
        task: What the plan makes of it.
        factors: One per model; None where a model does not change it.
        merged: What the method made of them, before it is brought to its rank.
        facts: What the method measured.
        factor: Multiplies the update for a norm-matched strength.
    """

    task: Task
    factors: tuple[Factors | None, ...]
    merged: Factors
    facts: Mapping[str, Any]
    factor: float = 1.0

    @property
    def name(self) -> str:
        """Module path."""
        return self.task.module

    @property
    def scale(self) -> float | None:
        """λ, if the method has one: measured, or as it was set."""
        given = self.facts.get("scale", self.task.parameters.get("scale"))
        return None if given is None else self.factor * float(given)
