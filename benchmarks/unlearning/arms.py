"""What is compared: objectives, ways to guard them, and what the guard is shown.

Placebos and the bound use the guard as it is; only the losses that it is given differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unlearning.encoding import Encoded, TokenBatch, collate

__all__ = ["ARMS", "METHODS", "Arm", "Feed", "Method", "shuffled", "swapped"]

_MICRO_BATCH = 32


@dataclass(frozen=True)
class Method:
    """One objective of the library.

    Args:
        objective: Its name.
        retain_weight: α, unless a run asks for another one.
        parameters: What is set explicitly.
    """

    objective: str
    retain_weight: float
    parameters: Mapping[str, float] = field(default_factory=dict)


METHODS = {
    "ga": Method("ga", 0.0),
    "grad-diff": Method("grad-diff", 1.0),
    "npo": Method("npo", 1.0, {"beta": 0.1}),
}


@dataclass(frozen=True)
class Arm:
    """One way to guard an objective.

    Args:
        meaning: For the report.
        preset: Of the projector; None: no projector, one backward pass of the weighted sum.
        bank: Whether the projector is given a bank.
        shown: Which rows the projector sees: ``retain``, ``shuffled``, ``swapped`` or ``drift``.
        changes: To the preset.
    """

    meaning: str
    preset: str | None
    bank: bool = False
    shown: str = "retain"
    changes: Mapping[str, Any] = field(default_factory=dict)


_SHUFFLED = "placebo: the rows' entries shuffled"
_SWAPPED = "placebo: retain questions with the answers of others"

ARMS = {
    "none": Arm("no projection", None),
    "history": Arm("rows: this batch and 8 before it; no extra backward pass", "gu-cheap"),
    "bank": Arm("rows: this batch and a bank over the retain set", "gu", bank=True),
    "history-shuffled": Arm(_SHUFFLED, "gu-cheap", shown="shuffled"),
    "bank-shuffled": Arm(_SHUFFLED, "gu", bank=True, shown="shuffled"),
    "history-swapped": Arm(_SWAPPED, "gu-cheap", shown="swapped"),
    "bank-swapped": Arm(_SWAPPED, "gu", bank=True, shown="swapped"),
    "bound": Arm(
        "cheats: the row is the gradient of the measured rows",
        "gu",
        shown="drift",
        changes={"rows": ("batch",)},
    ),
}


@dataclass(frozen=True)
class Feed:
    """The losses that a projector is given.

    Args:
        rows: What they are of.
        loss: Of a batch.
        start: Sum and number of token losses of each row in the starting model.
        whole: Whether a window sees all rows, not only those of the step's batch.
    """

    rows: Sequence[Encoded]
    loss: Callable[[TokenBatch], Tensor]
    start: tuple[Tensor, Tensor]
    whole: bool = False

    def window(self, places: Sequence[int]) -> tuple[Tensor, float]:
        """Return the loss of this step's rows, and what it was in the starting model."""
        if self.whole:
            places = range(len(self.rows))
        chosen = list(places)
        sums, counts = self.start
        return (
            self.loss(collate(self.rows, chosen)),
            float(sums[chosen].sum() / counts[chosen].sum()),
        )

    def groups(self, count: int, most: int) -> list[Callable[[], Iterator[tuple[Tensor, float]]]]:
        """Return the bank: groups of rows, which yield (loss, weight) of their micro-batches.

        Args:
            count: Number of groups.
            most: Rows in all groups together.
        """
        places = range(min(len(self.rows), most))
        return [lambda group=places[i::count]: self._micro(group) for i in range(count)]

    def _micro(self, group: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
        for first in range(0, len(group), _MICRO_BATCH):
            part = collate(self.rows, group[first : first + _MICRO_BATCH])
            yield self.loss(part), float((part["labels"] != -100).sum())


def shuffled(
    loss: Callable[[TokenBatch], Tensor], parameters: Sequence[Tensor], seed: int
) -> Callable[[TokenBatch], Tensor]:
    """Return a loss of the same value whose gradient has its entries shuffled in each tensor.

    The order is drawn once, so norms and inner products of rows stay what they were: what is lost
    is only their relation to the gradient of the forget loss.
    """
    draw = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(p.numel(), generator=draw) for p in parameters]

    def of(batch: TokenBatch) -> Tensor:
        value = loss(batch)
        total = value.detach()
        gradients = torch.autograd.grad(value, list(parameters))
        for parameter, gradient, order in zip(parameters, gradients, orders, strict=True):
            mixed = gradient.flatten()[order].view_as(gradient)
            total = total + ((parameter - parameter.detach()) * mixed).sum()
        return total

    return of


def swapped(rows: Sequence[Encoded], seed: int) -> list[Encoded]:
    """Return the rows with one another's answers; no row keeps its own."""
    order = list(range(len(rows)))
    random.Random(f"swapped {seed}").shuffle(order)
    found: list[Encoded] = list(rows)
    for own, other in zip(order, [*order[1:], order[0]], strict=True):
        prompt = sum(label == -100 for label in rows[own].labels)
        theirs = sum(label == -100 for label in rows[other].labels)
        answer = rows[other].labels[theirs:]
        found[own] = Encoded(
            rows[own].input_ids[:prompt] + answer, rows[own].labels[:prompt] + answer
        )
    return found
