"""Decide from measured losses when forgetting is enough and which step is kept; numbers only."""

from __future__ import annotations

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
        back: Go back to the best model so far, or the starting model, and halve the learning rate.
        reason: Why, for people; empty where nothing is to be said.
    """

    keep: bool
    stop: bool = False
    back: bool = False
    reason: str = ""


@dataclass
class StopRule:
    """Stop at the level of never having seen the data, never beyond, and before the rest suffers.

    A step is kept while its forget loss rises without passing ``level.loss + tolerance *
    level.deviation`` and its retain loss is at most ``max_retain_rise`` above the start. The first
    kept reading at or above ``level.loss`` stops. A step that is not within these bounds is taken
    back and the learning rate halved; after ``setbacks`` of them the run stops.

    Args:
        level: Where to stop; None runs to the last step.
        tolerance: In standard deviations of the level.
        max_retain_rise: Nats per token; None for no guard.
        start: The losses before the first step.
        setbacks: How often a step may be taken back.

    >>> rule = StopRule(Level(2.0, 0.1, "holdout"), 1.0, 0.3, Reading(0, 0.1, 0.2))
    >>> rule.judge(Reading(1, 1.0, 0.2)).keep, rule.judge(Reading(2, 2.05, 0.2)).stop
    (True, True)
    """

    level: Level | None
    tolerance: float
    max_retain_rise: float | None
    start: Reading
    setbacks: int = 4
    best: Reading | None = None
    taken_back: int = 0
    warnings: list[str] = field(default_factory=list)

    def judge(self, reading: Reading) -> Verdict:
        """Say what to do after one more reading."""
        fault = self._drift(reading) or self._excess(reading)
        if fault:
            return self._refused(fault)
        keep = self.best is None or reading.forget > self.best.forget
        if keep:
            self.best = reading
        if self.level is not None and reading.forget >= self.level.loss:
            reason = f"the forget loss reached the {self.level.source} level at step {reading.step}"
            return Verdict(keep=keep, stop=True, reason=reason)
        return Verdict(keep=keep)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, JSON-ready."""
        best = self.best and [self.best.step, self.best.forget, self.best.retain]
        return {"best": best, "taken_back": self.taken_back, "warnings": self.warnings}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave."""
        self.best = Reading(*state["best"]) if state["best"] else None
        self.taken_back, self.warnings = state["taken_back"], list(state["warnings"])

    def _drift(self, reading: Reading) -> str:
        if self.max_retain_rise is None or reading.retain is None or self.start.retain is None:
            return ""
        rise = reading.retain - self.start.retain
        if rise <= self.max_retain_rise:
            return ""
        return (
            f"step {reading.step} raised the retain loss by {rise:.3f}, more than "
            f"{self.max_retain_rise:g}"
        )

    def _excess(self, reading: Reading) -> str:
        level = self.level
        if level is None or reading.forget <= level.loss + self.tolerance * level.deviation:
            return ""
        return (
            f"step {reading.step} went beyond the {level.source} level: forget loss "
            f"{reading.forget:.3f}, level {level.loss:.3f} ± {level.deviation:.3f}"
        )

    def _refused(self, fault: str) -> Verdict:
        self.taken_back += 1
        stop = self.taken_back > self.setbacks
        done = "the best step before is kept" if stop else "taken back, learning rate halved"
        self.warnings.append(f"{fault}: {done}")
        return Verdict(keep=False, stop=stop, back=not stop, reason=self.warnings[-1])
