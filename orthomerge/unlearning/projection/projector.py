"""The projector: collects retain gradients over a window, projects, and guards the step.

The algebra is in removing (stage A) and correcting (stage B); this keeps the order of things.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from orthomerge.errors import RecipeError
from orthomerge.unlearning.projection.collecting import RowCollector
from orthomerge.unlearning.projection.guarding import Attachment, FiniteStep, StepGuard, unwrapped
from orthomerge.unlearning.projection.metrics import adam_metric, fisher_metric
from orthomerge.unlearning.projection.removing import (
    Scales,
    flat_gradient,
    masked,
    relative_residual,
)
from orthomerge.unlearning.projection.solving import grouped
from orthomerge.unlearning.projection.statistics import ProjectionStats
from orthomerge.unlearning.projection.writing import GradientStage

__all__ = ["RetainProjector"]


class RetainProjector(RowCollector):
    """Keep unlearning steps from raising retain losses, to first order.

    One window is one optimizer step: retain gradients and forget gradients of its micro-batches
    are accumulated apart, then projected once, because projection is not linear in the rows::

        for window in loader:
            for micro in window:
                projector.update(retain_loss(micro), weight=1 / len(window))
                (forget_loss(micro) / len(window)).backward()
            projector.project_(retain_weight=alpha, forget_scale=gamma)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with projector.guard(optimizer):
                optimizer.step()
            optimizer.zero_grad()
            projector.end_window()

    What holds exactly, up to rounding, is that the realised step does not raise (cone) or move
    (hard) the losses of the protected rows to first order. How well other retain data is
    protected depends on how well the rows cover it: use a bank over the whole retain set.

    Args:
        params_or_model: A module, named parameters or parameters; what needs no gradient is
            ignored, tied parameters count once.
        scope: Regular expression of the names to protect; all that are trained by default.
        optimizer: Whose second moments the metric ``"adam"`` of stage A reads; ``guard`` and
            ``attach`` set it too.
        fisher: Diagonal by parameter name for the metric ``"fisher"``.
        scaler: The GradScaler of fp16 training. Rows are unscaled with it; ``.grad`` is taken to
            be scaled when ``project_`` is called, unless told otherwise.
        process_group: Processes of data-parallel training. Rows and gradients are averaged over
            it; with ``sharded`` only sums of products are exchanged.
        sharded: Whether every process holds a part of each parameter (FSDP): gradients are
            reduced by the backward pass, and products are summed over ``process_group``, or over
            all processes if that is None.
        **settings: See ``ProjectionSettings``.

    Raises:
        RecipeError: A setting or a combination is not valid, or no parameter is in scope.

    References:
        arXiv:2511.17100 for stage A; the corrections of stage B, the bank and the restore rule
        are this library's.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> projector = RetainProjector([w], stage="A")
    >>> projector.update(w[0] + 3 * w[1])
    >>> (2 * w[0] + w[1]).backward()
    >>> _ = projector.project_()
    >>> w.grad.tolist()
    [1.5, -0.5]
    """

    def __init__(
        self,
        params_or_model: nn.Module | Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
        *,
        scope: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        fisher: Mapping[str, torch.Tensor] | None = None,
        scaler: Any | None = None,
        process_group: Any | None = None,
        sharded: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(params_or_model, scope, scaler, process_group, sharded, settings)
        self._optimizer, self._fisher = optimizer, fisher
        self._stage = GradientStage(self.window, self.scope, self.settings)
        self._guard = StepGuard(self.window, self.scope, self.settings, self._scales, self._group)
        self._warned = False
        self.projections = 0
        self.last = ProjectionStats()

    def reset(self) -> None:
        """Forget all rows and counts; the bank is computed anew at the next projection."""
        self._restart()
        self.projections = 0
        self._guard.corrections = 0
        self.last = ProjectionStats()
        self.window.forget()
        if self._bank is not None:
            self._bank.age = None

    @property
    def corrections(self) -> int:
        """Number of optimizer steps that stage B looked at."""
        return self._guard.corrections

    def project_(
        self,
        retain_weight: float = 0.0,
        forget_scale: float = 1.0,
        *,
        grad_scale: float | None = None,
    ) -> ProjectionStats:
        """Replace ``.grad``, the forget gradient, by ``gamma g_perp + alpha R``; once a window.

        Args:
            retain_weight: alpha, of the window's retain gradient R.
            forget_scale: gamma, of the projected forget gradient.
            grad_scale: Factor in ``.grad`` from loss scaling: 1 after ``scaler.unscale_``; by
                default the scaler's, if the projector has one.

        Returns:
            The window's statistics, also kept as ``last``.

        Raises:
            RecipeError: The window has no row, or was projected already.
            NumericalError: A gradient is not finite and the policy is ``"raise"``.
        """
        self._ready(retain_weight)
        started = time.perf_counter()
        self._average()
        refreshed = self._refresh()
        bank_time = time.perf_counter() - started
        self.window.smooth_over()
        scale = self._scale() if grad_scale is None else grad_scale
        P = (
            self._scales(self.settings.metric, self._optimizer)
            if self.settings.before_step
            else None
        )
        stats = self._stage.run(P, retain_weight * scale, forget_scale, scale)
        flags = [] if P is not None or self.settings.metric == "euclid" else ["cold_metric"]
        if "skipped_window" in stats.flags:
            self._leave_out()
        self._state, self._retain_weight = "projected", retain_weight
        self.projections += 1
        self.last = stats.flagged(
            *flags,
            window=self.projections - 1,
            stage=self.settings.stage,
            refreshed=refreshed,
            bank_milliseconds=1e3 * bank_time,
            milliseconds=1e3 * (time.perf_counter() - started - bank_time),
            bytes=self.window.bytes + self._guard.bytes,
        )
        self._warn_outside()
        return self.last

    def measure(self) -> ProjectionStats:
        """Return cosine and residual of the current ``.grad`` against the rows; change nothing."""
        K, b, norms = self.window.rows.measure(lambda t: flat_gradient(self.scope.parameters[t]))
        active, flags = self.window.active(K, float(norms.sum()) ** 0.5)
        problem = masked(grouped(K, b, norms, self.scope.groups), active)
        hard = self.settings.mode == "hard"
        residual = relative_residual(problem, problem.norms, hard=hard, ascent=True)
        total = problem.total()
        return ProjectionStats(
            window=self.projections,
            k=int(active.sum()),
            residual=float(residual.max()),
            cos_forget_retain=float(total.cosines[0, self.window.protected]),
            flags=tuple(flags),
            bytes=self.window.bytes + self._guard.bytes,
        )

    @contextmanager
    def guard(
        self, optimizer: torch.optim.Optimizer, finite_step: FiniteStep | None = None
    ) -> Iterator[None]:
        """Correct the step that the block takes; see the class for where it belongs.

        Raises:
            RecipeError: The window was not projected, or stage A alone meets momentum.
        """
        self._before_step(unwrapped(optimizer), finite_step)
        yield
        self._after_step(unwrapped(optimizer), finite_step)

    def attach(
        self, optimizer: torch.optim.Optimizer, finite_step: FiniteStep | None = None
    ) -> Attachment:
        """Guard every step of an optimizer from now on, by hooks; a new window ends the last.

        A step that a GradScaler skips calls no hooks, and nothing is corrected.

        Returns:
            A handle whose ``remove()`` takes the hooks off.

        Raises:
            RecipeError: Stage A alone meets momentum.
        """
        self._guard.check(unwrapped(optimizer))
        self._optimizer = unwrapped(optimizer)
        self._attached += 1
        return Attachment(
            optimizer,
            lambda inner: self._before_step(inner, finite_step),
            lambda inner: self._after_step(inner, finite_step),
        )

    def _before_step(
        self, optimizer: torch.optim.Optimizer, finite_step: FiniteStep | None
    ) -> None:
        self._guard.check(optimizer)
        self._optimizer = optimizer
        if self._state != "projected":
            raise RecipeError(
                "the optimizer steps without a projection in this window",
                expected="project_() before the step",
                found=self._state,
            )
        if self.settings.after_step or finite_step is not None:
            self._guard.before(self._retain_weight, finite_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, finite_step: FiniteStep | None) -> None:
        self._state = "stepped"
        if not (self.settings.after_step or finite_step is not None):
            return
        if "skipped_window" in self.last.flags:
            self._guard.undo()
            return
        self.last = self._guard.after(optimizer, self.last, float(self._rise), finite_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what reproduces the next window: history, bank, smoothed row and counters.

        The rows are gradients of retain data: keep them as private as the data itself.

        Raises:
            RecipeError: A window is open, with rows that are not projected yet.
        """
        if self._state == "open" and (self.window.filled or self.window.extra):
            raise RecipeError("a window is open", remedy="Save after the optimizer's step.")
        if self._state != "open":
            self.end_window()
        return {
            "window": self.window.state_dict(),
            "names": list(self.scope.names),
            "age": None if self._bank is None else self._bank.age,
            "projections": self.projections,
            "corrections": self.corrections,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over ``state_dict`` of a projector with the same settings and bank.

        Raises:
            RecipeError: The state is of other parameters, or of another number of bank rows.
        """
        banked = 0 if self._bank is None else len(self._bank)
        saved = len(state["window"]["bank"])
        if list(self.scope.names) != state["names"] or banked != saved:
            raise RecipeError(
                "the state is not of this projector",
                expected=f"{len(self.scope.names)} parameters, bank of {banked}",
                found=f"{len(state['names'])} parameters, bank of {saved}",
                remedy="Set the bank before loading.",
            )
        self.window.load_state_dict(state["window"])
        if self._bank is not None:
            self._bank.age = state["age"]
        self.projections, self._guard.corrections = state["projections"], state["corrections"]
        self._restart()

    def _scales(self, name: str, optimizer: torch.optim.Optimizer | None) -> Scales:
        """Return the flat preconditioner of a metric; None for the identity."""
        if name == "euclid":
            return None
        if name == "fisher":
            return fisher_metric(self._fisher, self.scope.names, self.scope.parameters)
        if optimizer is None:
            raise RecipeError(
                "the metric 'adam' needs the optimizer",
                remedy="Pass optimizer=, or attach the projector to it first.",
            )
        return adam_metric(unwrapped(optimizer), self.scope.parameters)

    def _warn_outside(self) -> None:
        if self.last.outside > 0 and not self._warned:
            warnings.warn(
                f"{self.last.outside:.0%} of the squared retain gradient is in trained parameters "
                "outside the scope; they are not protected: freeze them or widen the scope",
                stacklevel=3,
            )
            self._warned = True
