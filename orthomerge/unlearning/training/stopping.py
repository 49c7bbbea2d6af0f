"""Decide from measured losses when forgetting is enough and which step is kept; numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Level", "Reading", "StopRule", "Verdict"]


@dataclass(frozen=True, slots=True)
class Level:
    """The forget loss of a model that never saw the forget set.

    Attributes:
        loss: Mean over rows of the loss per token.
        deviation: Standard deviation of the rows' losses.
        source: Where it is from: ``gold``, ``holdout`` or ``given``.
    """

    loss: float
    deviation: float
    source: Literal["gold", "holdout", "given"]


@dataclass(frozen=True, slots=True)
class Reading:
    """Losses measured after a step, nats per token; ``retain`` is None without a retain set."""

    step: int
    forget: float
    retain: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do after a step.

    Attributes:
        keep: The model of this step is the best so far.
        stop: No further step.
        slower: Halve the learning rate.
        reason: Why, for people; empty where nothing is to be said.
    """

    keep: bool
    stop: bool = False
    slower: bool = False
    reason: str = ""


@dataclass
class StopRule:
    """Stop at the level of never having seen the data, never beyond, and before the rest suffers.

    A step is kept while its forget loss rises without passing ``level.loss + tolerance *
    level.deviation``. The first reading at or above ``level.loss`` stops. A retain loss more than
    ``max_retain_rise`` above the start halves the learning rate once, and stops the second time;
    such a step is not kept.

    Args:
        level: Where to stop; None runs to the last step.
        tolerance: In standard deviations of the level.
        max_retain_rise: Nats per token; None for no guard.
        start: The losses before the first step.

    >>> rule = StopRule(Level(2.0, 0.1, "holdout"), 1.0, 0.3, Reading(0, 0.1, 0.2))
    >>> rule.judge(Reading(1, 1.0, 0.2)).keep, rule.judge(Reading(2, 2.05, 0.2)).stop
    (True, True)
    """

    level: Level | None
    tolerance: float
    max_retain_rise: float | None
    start: Reading
    best: Reading | None = None
    slowed: bool = False
    warnings: list[str] = field(default_factory=list)

    def judge(self, reading: Reading) -> Verdict:
        """Say what to do after one more reading."""
        if self._drifted(reading):
            return self._guard(reading)
        if self.level is not None and reading.forget > self._limit:
            text = (
                f"step {reading.step} went beyond the {self.level.source} level "
                f"({reading.forget:.3f}, level {self.level.loss:.3f} "
                f"± {self.level.deviation:.3f}): over-unlearned, not kept"
            )
            self.warnings.append(text)
            return Verdict(keep=self._take(reading, False), stop=True, reason=text)
        better = self.best is None or reading.forget > self.best.forget
        keep = self._take(reading, better)
        if self.level is not None and reading.forget >= self.level.loss:
            reason = f"the forget loss reached the {self.level.source} level at step {reading.step}"
            return Verdict(keep=keep, stop=True, reason=reason)
        return Verdict(keep=keep)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, JSON-ready."""
        best = self.best and [self.best.step, self.best.forget, self.best.retain]
        return {"best": best, "slowed": self.slowed, "warnings": self.warnings}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave."""
        self.best = Reading(*state["best"]) if state["best"] else None
        self.slowed, self.warnings = state["slowed"], list(state["warnings"])

    @property
    def _limit(self) -> float:
        if self.level is None:
            return math.inf
        return self.level.loss + self.tolerance * self.level.deviation

    def _drifted(self, reading: Reading) -> bool:
        if self.max_retain_rise is None or reading.retain is None or self.start.retain is None:
            return False
        return reading.retain - self.start.retain > self.max_retain_rise

    def _guard(self, reading: Reading) -> Verdict:
        assert reading.retain is not None
        assert self.start.retain is not None
        rise = reading.retain - self.start.retain
        text = (
            f"the retain loss has risen by {rise:.3f} at step {reading.step}, more than "
            f"{self.max_retain_rise:g}"
        )
        if self.slowed:
            self.warnings.append(f"{text}: stopped; the last step within the limit is kept")
            return Verdict(keep=False, stop=True, reason=self.warnings[-1])
        self.slowed = True
        self.warnings.append(f"{text}: the learning rate is halved")
        return Verdict(keep=False, slower=True, reason=self.warnings[-1])

    def _take(self, reading: Reading, better: bool) -> bool:
        if better:
            self.best = reading
        return better
