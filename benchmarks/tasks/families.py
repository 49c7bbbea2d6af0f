"""Families of experts: one expert per task and seed, all of one kind and trained to one plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.experts import KINDS, ExpertSettings
from tasks.splits import TASKS

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """A way to train one expert per task.

    Args:
        meaning: One line for the report.
        kind: A name of ``KINDS``.
        louder: Tasks whose learning rate is four times the usual one.
        shared_start: Whether the experts of one seed start from the same random adapter.
    """

    meaning: str
    kind: str = "lora"
    louder: Sequence[str] = ()
    shared_start: bool = False

    def experts(self, tasks: Sequence[str], seed: int, steps: int) -> list[ExpertSettings]:
        """Return what the experts of one seed are trained with."""
        names = list(TASKS)
        rate = KINDS[self.kind].learning_rate
        return [
            ExpertSettings(
                kind=self.kind,
                task=task,
                seed=seed,
                init=1000 * seed + (999 if self.shared_start else names.index(task)),
                learning_rate=rate * (4 if task in self.louder else 1),
                steps=steps,
            )
            for task in tasks
        ]


#: The families by name.
FAMILIES: dict[str, Family] = {
    "lora": Family("LoRA rank 8, every expert from its own random start"),
    "lora_imb": Family(
        "the same, but three experts were trained at four times the learning rate",
        louder=("movie", "subj", "product"),
    ),
    "lora_same_init": Family(
        "LoRA rank 8, the experts of a seed share the random start of A", shared_start=True
    ),
}
