"""Watch an optimizer's step: keep the parameters before it, correct the update after it.

The correction itself is in correcting; the optional search for a shorter step is here.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orthomerge.errors import NumericalError, RecipeError
from orthomerge.linalg.precision import full_precision
from orthomerge.unlearning.projection.correcting import Adjustment, Snapshot, correct_update
from orthomerge.unlearning.projection.metrics import has_momentum
from orthomerge.unlearning.projection.products import average_
from orthomerge.unlearning.projection.removing import Scales
from orthomerge.unlearning.projection.scopes import Scope
from orthomerge.unlearning.projection.settings import ProjectionSettings
from orthomerge.unlearning.projection.solving import effective_rank
from orthomerge.unlearning.projection.statistics import ProjectionStats
from orthomerge.unlearning.projection.window import Window

__all__ = ["Attachment", "FiniteStep", "StepGuard", "unwrapped"]

Metric = Callable[[str, torch.optim.Optimizer | None], Scales]


@dataclass(frozen=True, slots=True)
class FiniteStep:
    """Keep the largest of a few scales of the update whose measured retain loss stays in budget.

    ``L(theta + s Delta) - L(theta) <= budget`` is measured, not predicted, so that it also holds
    where the step is too long for first order; with no such s the step is zero.

    Attributes:
        loss: Retain loss of the model as it is now; called without gradients.
        budget: Largest rise, in the loss's unit.
        scales: What to try, largest first.
    """

    loss: Callable[[], torch.Tensor | float]
    budget: float = 1e-4
    scales: Sequence[float] = (1.0, 0.5, 0.25, 0.125)

    @torch.no_grad()
    def value(self) -> float:
        """Return the loss now."""
        return float(self.loss())

    @torch.no_grad()
    def shorten(self, snapshot: Snapshot, start: float) -> float:
        """Write the largest allowed share of the update, and return it."""
        deltas = [snapshot.delta(index) for index in range(len(snapshot.parameters))]
        for scale in self.scales:
            if scale != 1:
                for index, delta in enumerate(deltas):
                    snapshot.write(index, scale * delta)
            if self.value() - start <= self.budget:
                return scale
        snapshot.restore()
        return 0.0


class StepGuard:
    """Stage B around one optimizer step.

    Args:
        window: Protected rows.
        scope: Protected parameters.
        settings: Mode, metric and policies of stage B.
        metric: Gives the flat preconditioner of a named metric, None for the identity.
        group: Processes to average scalars over, or None.
    """

    def __init__(
        self,
        window: Window,
        scope: Scope,
        settings: ProjectionSettings,
        metric: Metric,
        group: Any | None,
    ) -> None:
        self._window, self._scope, self._settings = window, scope, settings
        self._metric, self._group = metric, group
        self._snapshot: Snapshot | None = None
        self._start = 0.0
        self._warned = False
        self.corrections = 0

    @property
    def bytes(self) -> int:
        """Memory of the parameters' copies."""
        return 0 if self._snapshot is None else self._snapshot.bytes

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse momentum without stage B, unless that was allowed; then warn once."""
        if self._settings.after_step or not has_momentum(optimizer):
            return
        if not self._settings.allow_approximate:
            raise RecipeError(
                "stage A alone does not hold with momentum: old gradients come back unprojected",
                expected="stage 'AB' or 'B'",
                found=f"stage '{self._settings.stage}' with {type(optimizer).__name__}",
                remedy="Use stage 'AB', an optimizer without momentum, or allow_approximate.",
            )
        if not self._warned:
            warnings.warn(
                "stage A with momentum protects the retain loss only approximately", stacklevel=3
            )
            self._warned = True

    def before(self, retain_weight: float, finite_step: FiniteStep | None) -> None:
        """Copy the parameters."""
        if self._snapshot is None:
            self._snapshot = Snapshot(self._scope.parameters)
        else:
            self._snapshot.take()
        if finite_step is not None:
            self._start = finite_step.value()
        hard = self._settings.after_step and self._settings.delta_mode == "hard"
        if hard and retain_weight > 0 and not self._warned:
            warnings.warn(
                "a hard stage B cancels the descent of the retain term in the loss; "
                "use delta_mode 'cone' when the retain weight is positive",
                stacklevel=3,
            )
            self._warned = True

    def undo(self) -> None:
        """Put the parameters back to where they were before the step."""
        if self._snapshot is not None:
            self._snapshot.restore()

    @torch.no_grad()
    @full_precision()
    def after(
        self,
        optimizer: torch.optim.Optimizer | None,
        stats: ProjectionStats,
        rise: float,
        finite_step: FiniteStep | None,
    ) -> ProjectionStats:
        """Correct the update, and return the statistics completed by what was done.

        Args:
            optimizer: Whose second moments the metric may need.
            stats: Numbers of stage A.
            rise: Retain loss of the window above that of the starting model, in the row's unit.
            finite_step: See ``FiniteStep``.
        """
        started = time.perf_counter()
        snapshot, rows = self._snapshot, self._window.rows
        if snapshot is None:
            return stats.flagged("no_step")
        proposed = rows.against(snapshot.delta)
        square = float(proposed[1].sum())
        if not square > 0 or square == float("inf"):
            return self._unusual(stats, square)
        active, flags = self._window.active(rows.gram(), square**0.5)
        restoring = self._restoring(rise, active)
        found = correct_update(
            rows,
            snapshot,
            self._scope.groups,
            active,
            self._settings,
            P=self._metric(self._settings.delta_metric, optimizer),
            restoring=restoring,
            proposed=proposed,
        )
        scale = 1.0 if finite_step is None else finite_step.shorten(snapshot, self._start)
        self.corrections += 1
        flags += ["out_of_reach"] if found.missed else []
        flags += ["shortened"] if scale < 1 else []
        elapsed = stats.milliseconds + 1e3 * (time.perf_counter() - started)
        changes = _numbers(found, self._window.protected, bool(active.any()))
        return stats.flagged(
            *flags,
            milliseconds=elapsed,
            restoring=restoring[1],
            step_scale=scale,
            k=max(stats.k, int(active.sum())),
            **changes,
        )

    def _restoring(self, rise: float, active: torch.Tensor) -> tuple[int, float]:
        excess = torch.tensor([rise], dtype=torch.float64)
        if self._group is not None:
            excess = excess.to(self._snapshot.parameters[0].device) if self._snapshot else excess
            average_([excess], self._group)
        slot = self._window.protected
        wanted = self._settings.restore * max(0.0, float(excess))
        return slot, wanted if bool(active[slot]) else 0.0

    def _unusual(self, stats: ProjectionStats, square: float) -> ProjectionStats:
        if square == 0:
            return stats.flagged("no_step")
        if self._settings.nan_policy == "raise":
            raise NumericalError(
                "the optimizer's update is not finite",
                remedy="Lower the learning rate or check the loss.",
            )
        self.undo()
        return stats.flagged("nonfinite_update")


def _numbers(found: Adjustment, slot: int, protected: bool) -> dict[str, Any]:
    """Return the statistics of stage B by their names."""
    info = found.info
    numbers = {
        "correction": found.correction,
        "residual_after": found.residual,
        "quantised_zero": found.quantised,
    }
    if protected:
        numbers |= {
            "cos_before": float(found.before.cosines[0, slot]),
            "cos_after": float(found.after.cosines[0, slot]),
            "predicted": float(found.after.b[0, slot]),
        }
    if info is not None:
        numbers |= {"rank": effective_rank(info), "condition": float(info.condition.max())}
    return numbers


class Attachment:
    """Hooks on an optimizer; ``remove`` takes them off."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[torch.optim.Optimizer], None],
        after: Callable[[torch.optim.Optimizer], None],
    ) -> None:
        inner = unwrapped(optimizer)
        self._handles = [
            inner.register_step_pre_hook(lambda opt, args, kwargs: before(opt)),
            inner.register_step_post_hook(lambda opt, args, kwargs: after(opt)),
        ]

    def remove(self) -> None:
        """Take the hooks off; once is enough, again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside the wrappers that accelerate puts around it."""
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    found: torch.optim.Optimizer = inner
    return found
