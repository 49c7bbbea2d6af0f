"""What happens after every optimizer step: statistics, measurements, the decision to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from orthomerge.errors import VerificationError
from orthomerge.unlearning.training.keeping import Snapshot
from orthomerge.unlearning.training.stopping import Reading, StopRule, Verdict

__all__ = ["StepReport", "UnlearnCallback"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, for the log and for progress displays.

    Attributes:
        step: Its number, from 1.
        steps: Most steps of the run.
        forget_loss: The objective's forget loss on the step's batch.
        retain_loss: Its retain loss, or None.
        learning_rate: Of the step.
        seconds: From its first batch to the end of its update.
        projection: The projection's statistics, or None.
        reading: What was measured after it, or None.
        verdict: What was decided from that, or None.
    """

    step: int
    steps: int
    forget_loss: float
    retain_loss: float | None
    learning_rate: float
    seconds: float
    projection: Mapping[str, Any] | None
    reading: Reading | None
    verdict: Verdict | None

    def as_dict(self) -> dict[str, Any]:
        """Return the step as one JSON-ready object."""
        facts: dict[str, Any] = {
            "step": self.step,
            "forget_loss": self.forget_loss,
            "retain_loss": self.retain_loss,
            "learning_rate": self.learning_rate,
            "seconds": round(self.seconds, 4),
        }
        if self.projection is not None:
            facts["projection"] = dict(self.projection)
        if self.reading is not None:
            facts["measured"] = {"forget": self.reading.forget, "retain": self.reading.retain}
        if self.verdict is not None and self.verdict.reason:
            facts["decision"] = self.verdict.reason
        return facts


class UnlearnCallback(TrainerCallback):  # type: ignore[misc]
    """Close the projection's window, measure, keep the best step, stop, and report.

    Args:
        measure: ``(step) -> Reading``.
        rule: Decides.
        start: The model before the first step.
        every: Steps between measurements.
        report: Is told of every step.
    """

    def __init__(
        self,
        measure: Callable[[int], Reading],
        rule: StopRule,
        start: Snapshot,
        *,
        every: int,
        report: Callable[[StepReport], None],
    ) -> None:
        self.trainer: Any = None
        self.start = start
        self.best: Snapshot | None = None
        self.rule = rule
        self.reason = ""
        self._measure, self._every, self._report = measure, every, report
        self._clock, self._rate = time.perf_counter(), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock, and note its learning rate before the schedule goes on."""
        del args, state, control
        self._clock = time.perf_counter()
        self._rate = float(self.trainer.optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Do everything that follows a step."""
        trainer, step = self.trainer, state.global_step
        if trainer.projector is not None:
            self._require_corrected()
            trainer.projector.end_window()
        if "retain" in trainer.parts:
            trainer.objective.after_step(trainer.parts["retain"], epoch=state.epoch)
        seconds = time.perf_counter() - self._clock
        reading = verdict = None
        if step % self._every == 0 or step >= state.max_steps:
            reading = self._measure(step)
            if trainer.processes is not None:
                reading = trainer.processes.first(reading)
            verdict = self.rule.judge(reading)
            self._obey(verdict, step, control)
        control.should_save = control.should_save and not control.should_training_stop
        self._report(self._described(state.max_steps, step, seconds, reading, verdict))

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, for ``torch.save``."""
        return {
            "rule": self.rule.state(),
            "best": None if self.best is None else self.best.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave."""
        self.rule.restore(state["rule"])
        self.best = state["best"] and Snapshot.from_state(state["best"])

    def _require_corrected(self) -> None:
        if self.trainer.projector.stepped or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        raise VerificationError(
            "the optimizer stepped without being corrected: it called no step hooks",
            remedy="Use an optimizer that calls the hooks of torch.optim.Optimizer.",
        )

    def _obey(self, verdict: Verdict, step: int, control: Any) -> None:
        trainer = self.trainer
        if verdict.keep:
            self.best = Snapshot(trainer.model, step)
        if verdict.back:
            (self.best or self.start).restore(trainer.model)
            trainer.lr_scheduler.base_lrs = [rate / 2 for rate in trainer.lr_scheduler.base_lrs]
            for group in trainer.optimizer.param_groups:
                group["lr"] /= 2
        if verdict.stop:
            self.reason = verdict.reason
            control.should_training_stop = True

    def _described(
        self,
        steps: int,
        step: int,
        seconds: float,
        reading: Reading | None,
        verdict: Verdict | None,
    ) -> StepReport:
        trainer = self.trainer
        last = None if trainer.projector is None else trainer.projector.last
        return StepReport(
            step=step,
            steps=steps,
            forget_loss=trainer.parts["forget"],
            retain_loss=trainer.parts.get("retain"),
            learning_rate=self._rate,
            seconds=seconds,
            projection=None if last is None else last.as_dict(),
            reading=reading,
            verdict=verdict,
        )
