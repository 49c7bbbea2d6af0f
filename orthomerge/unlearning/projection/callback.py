"""Protection for fine-tuning scripts: stage B in any transformers Trainer, as a callback.

A callback cannot separate forget and retain losses; unlearning itself needs its own trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from orthomerge.errors import RecipeError, VerificationError
from orthomerge.unlearning.projection.guarding import Attachment
from orthomerge.unlearning.projection.projector import RetainProjector
from orthomerge.unlearning.projection.statistics import ProjectionStats

__all__ = ["RetainProjectionCallback"]  # noqa: F822 - made on first use, below

RetainLosses = Callable[[], Iterable[tuple[torch.Tensor, float]]]


def __getattr__(name: str) -> Any:
    """Make the class on first use: its base is in transformers, which is slow to import."""
    if name == "RetainProjectionCallback":
        made = _callback_class()
        globals()[name] = made
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _callback_class() -> type:
    from transformers import TrainerCallback

    class RetainProjectionCallback(TrainerCallback):  # type: ignore[misc]
        __doc__ = _Protection.__doc__

        def __init__(self, projector: RetainProjector, retain: RetainLosses) -> None:
            self.protection = _Protection(projector, retain)

        @property
        def history(self) -> list[ProjectionStats]:
            """Statistics of every optimizer step."""
            return self.protection.history

        def on_train_begin(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            self.protection.begin(optimizer, state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.protection.collect()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.protection.record()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.protection.end(state.global_step)

    RetainProjectionCallback.__module__ = __name__
    RetainProjectionCallback.__qualname__ = "RetainProjectionCallback"
    return RetainProjectionCallback


class _Protection:
    """Correct every optimizer step of a Trainer so that retain losses do not rise.

    Before a step, when gradients are accumulated and clipped, the retain losses' gradient is
    computed beside them; after it, the realised update is corrected (stage B). Gradients are not
    changed. The end of training verifies that every optimizer step was protected.

    Args:
        projector: With stage ``"B"``; its model is the one that is trained.
        retain: Yields (loss, weight) of retain micro-batches for the coming step.

    Raises:
        RecipeError: The projector has another stage.
    """

    def __init__(self, projector: RetainProjector, retain: RetainLosses) -> None:
        if projector.settings.stage != "B":
            raise RecipeError(
                "a callback can only correct updates",
                expected="stage 'B'",
                found=f"stage '{projector.settings.stage}'",
                remedy="Use the unlearning trainer for stage A.",
            )
        self._projector, self._retain = projector, retain
        self._attachment: Attachment | None = None
        self._first = 0
        self.history: list[ProjectionStats] = []

    def begin(self, optimizer: torch.optim.Optimizer | None, step: int) -> None:
        if optimizer is None:
            raise RecipeError("the Trainer did not say which optimizer it uses")
        self._attachment = self._projector.attach(optimizer)
        self._first = step - self._projector.projections

    def collect(self) -> None:
        for loss, weight in self._retain():
            self._projector.update(loss, weight)
        self._projector.project_()

    def record(self) -> None:
        self.history.append(self._projector.last)

    def end(self, step: int) -> None:
        if self._attachment is not None:
            self._attachment.remove()
        protected = self._projector.projections + self._first
        if protected != step:
            raise VerificationError(
                "not every optimizer step was protected",
                expected=f"{step} steps",
                found=f"{protected} projections",
            )
