"""Paired bootstrap over test texts and seeds: numbers in, numbers out.

Every method is tested on the same texts, so a resampled set of texts is the same for all methods
and seeds; differences between methods are taken within a resampled set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "Resampled", "difference", "normalised", "worst"]

Array = NDArray[np.float64]

#: Per seed, per task: one boolean per test text.
Outcomes = Sequence[Mapping[str, Sequence[bool]]]


@dataclass(frozen=True)
class Interval:
    """A value with two 95 % intervals, in the value's unit.

    Args:
        value: On the texts and seeds as they are.
        texts: Low and high end when only the texts are resampled.
        both: Low and high end when texts and seeds are.
        per_seed: The value of each seed.
    """

    value: float
    texts: tuple[float, float]
    both: tuple[float, float]
    per_seed: tuple[float, ...]

    def record(self) -> dict[str, object]:
        """Return it for a result file."""
        return {
            "value": round(self.value, 6),
            "interval_texts": [round(end, 6) for end in self.texts],
            "interval_texts_and_seeds": [round(end, 6) for end in self.both],
            "per_seed": [round(value, 6) for value in self.per_seed],
        }


class Resampled:
    """The same resampled sets of texts and seeds for every method.

    Args:
        tasks: Number of test texts by task.
        seeds: Number of seeds.
        draws: Number of resampled sets.
        seed: Of the drawing.
    """

    def __init__(
        self, tasks: Mapping[str, int], seeds: int, *, draws: int = 4000, seed: int = 0
    ) -> None:
        draw = np.random.default_rng(seed)
        self.tasks = list(tasks)
        self._counts = {
            task: draw.multinomial(count, np.full(count, 1 / count), size=draws) / count
            for task, count in tasks.items()
        }
        self._seeds = draw.integers(seeds, size=(draws, seeds))

    def accuracies(self, outcomes: Outcomes) -> tuple[Array, Array]:
        """Return accuracies [seeds, tasks] and their resampled versions [draws, seeds, tasks]."""
        plain, drawn = [], []
        for seed in outcomes:
            rows = [np.asarray(seed[task], dtype=np.float64) for task in self.tasks]
            plain.append([row.mean() for row in rows])
            drawn.append([self._counts[t] @ r for t, r in zip(self.tasks, rows, strict=True)])
        return np.array(plain), np.array(drawn).transpose(2, 0, 1)

    def interval(self, plain: Array, drawn: Array) -> Interval:
        """Return the interval of a statistic's mean over the seeds.

        Args:
            plain: [seeds], on the texts as they are.
            drawn: [draws, seeds], on the resampled texts.
        """
        rows = np.arange(len(drawn))[:, None]
        both = drawn[rows, self._seeds].mean(1)
        return Interval(
            float(plain.mean()),
            _ends(drawn.mean(1)),
            _ends(both),
            tuple(float(value) for value in plain),
        )

    def mean(self, outcomes: Outcomes) -> Interval:
        """Return the mean accuracy over the tasks."""
        plain, drawn = self.accuracies(outcomes)
        return self.interval(plain.mean(1), drawn.mean(2))


def difference(sets: Resampled, ours: Outcomes, theirs: Outcomes) -> Interval:
    """Return mean accuracy of the first minus that of the second, seed by seed and text by text."""
    (a, a_drawn), (b, b_drawn) = sets.accuracies(ours), sets.accuracies(theirs)
    return sets.interval((a - b).mean(1), (a_drawn - b_drawn).mean(2))


def normalised(sets: Resampled, ours: Outcomes, experts: Outcomes) -> Interval:
    """Return the mean over the tasks of accuracy / the expert's accuracy."""
    plain, drawn = _ratios(sets, ours, experts)
    return sets.interval(plain.mean(1), drawn.mean(2))


def worst(sets: Resampled, ours: Outcomes, experts: Outcomes) -> Interval:
    """Return the smallest ratio of any task, per seed."""
    plain, drawn = _ratios(sets, ours, experts)
    return sets.interval(plain.min(1), drawn.min(2))


def _ratios(sets: Resampled, ours: Outcomes, experts: Outcomes) -> tuple[Array, Array]:
    (a, a_drawn), (b, b_drawn) = sets.accuracies(ours), sets.accuracies(experts)
    return a / b, a_drawn / b_drawn


def _ends(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
