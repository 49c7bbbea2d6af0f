"""One window's gradients: check them, project them, add the retain part, and say what happened.

Stage A as a whole; the algebra is in removing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.precision import full_precision
from orthomerge.unlearning.projection.removing import (
    Removal,
    Scales,
    flat_gradient,
    remove_tangent,
)
from orthomerge.unlearning.projection.scopes import Scope, local
from orthomerge.unlearning.projection.settings import ProjectionSettings
from orthomerge.unlearning.projection.solving import effective_rank, grouped
from orthomerge.unlearning.projection.statistics import ProjectionStats
from orthomerge.unlearning.projection.window import Window

__all__ = ["GradientStage"]

_Products = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class GradientStage:
    """Stage A on the gradients of a scope.

    Args:
        window: The rows.
        scope: Protected parameters and the other trained ones.
        settings: Mode and policies.
    """

    def __init__(self, window: Window, scope: Scope, settings: ProjectionSettings) -> None:
        self._window, self._scope, self._settings = window, scope, settings

    @torch.no_grad()
    @full_precision()
    def run(self, P: Scales, alpha: float, gamma: float, scale: float) -> ProjectionStats:
        """Write ``gamma g_perp + alpha R`` into ``.grad``.

        Args:
            P: Flat preconditioner per protected parameter; None for the identity.
            alpha: Factor of the window's retain gradient.
            gamma: Factor of the projected forget gradient.
            scale: Factor in ``.grad`` from loss scaling, for the statistics alone.
        """
        if not self._settings.before_step and not self._settings.after_step:
            self._combine(alpha, gamma)
            return ProjectionStats()
        measured, flags = self._finite(P)
        if measured is None:
            return ProjectionStats(flags=(*flags, "skipped_window"))
        return self._project(P, measured, alpha, gamma, scale).flagged(*flags)

    def _finite(self, P: Scales) -> tuple[_Products | None, list[str]]:
        """Measure; leave out rows that are not finite, or the window if it cannot do without."""
        K, b, norms = self._window.rows.measure(self._gradient, P)
        problems = []
        if not bool(torch.isfinite(norms.sum())):
            problems.append("nonfinite_forget")
        spoilt = self._window.spoilt(K)
        if self._window.batch in spoilt:
            problems.append("nonfinite_retain")
            self._window.usable = False
        if (problems or spoilt) and self._settings.nan_policy == "raise":
            raise NumericalError(
                "a gradient is not finite",
                found=", ".join(problems) or f"{len(spoilt)} protected rows",
                remedy="Lower the learning rate, or skip such windows with nan_policy 'skip'.",
            )
        for slot in spoilt:
            self._window.drop(slot)
            K[:, slot] = K[:, :, slot] = 0.0
            b[:, slot] = 0.0
        if problems:
            return None, problems
        return (K, b, norms), ["dropped_rows"] if spoilt else []

    def _project(
        self, P: Scales, measured: _Products, alpha: float, gamma: float, scale: float
    ) -> ProjectionStats:
        K, b, norms = measured
        window, slot = self._window, self._window.batch
        active, flags = window.active(K, float(norms.sum()) ** 0.5)
        retain = float(K[:, slot, slot].sum())
        if bool(active[window.protected]):  # noise must not lower the median
            window.norms.append(retain**0.5)
        whole = grouped(K, b, norms, torch.zeros_like(self._scope.groups))
        stats = ProjectionStats(
            k=int(active.sum()),
            cos_forget_retain=float(whole.cosines[0, slot]),
            slope=(gamma * float(whole.b[0, slot]) + alpha * retain) / scale,
            outside=self._outside_share(retain),
            flags=tuple(flags),
        )
        if self._settings.before_step and bool(active.any()):
            removal = remove_tangent(
                window.rows,
                self._scope.parameters,
                self._scope.groups,
                active,
                slot,
                self._settings,
                P,
                measured,
            )
            stats, gamma = self._described(stats, removal, alpha * retain, gamma, scale)
        self._combine(alpha, gamma, K[:, slot, slot] > 0)
        return stats

    def _described(
        self, stats: ProjectionStats, removal: Removal, help_: float, gamma: float, scale: float
    ) -> tuple[ProjectionStats, float]:
        """Complete the statistics; return them and gamma, which is 0 if too little was kept."""
        info, kept = removal.info, removal.kept
        if kept < self._settings.min_kept and float(removal.before.norms.sum()) > 0:
            gamma, stats = 0.0, stats.flagged("collinear")
        stats = replace(
            stats,
            kept=kept,
            residual=removal.residual,
            slope=(gamma * float(removal.retain_product) + help_) / scale,
        )
        if info is not None:
            stats = replace(stats, rank=effective_rank(info), condition=float(info.condition.max()))
        return stats, gamma

    def _combine(self, alpha: float, gamma: float, present: torch.Tensor | None = None) -> None:
        """Scale every gradient by gamma and add alpha R, for parameters in scope or not."""
        window = self._window
        _add(self._scope.parameters, window.rows.views(window.batch), alpha, gamma, present)
        if window.outside is not None:
            _add(self._scope.outside, window.outside.views(0), alpha, gamma, None)

    def _outside_share(self, inside: float) -> float:
        if self._window.outside is None or not self._window.filled:
            return 0.0
        outside = float(self._window.outside.gram().sum())
        return outside / (inside + outside) if outside > 0 else 0.0

    def _gradient(self, index: int) -> torch.Tensor:
        return flat_gradient(self._scope.parameters[index])


def _add(
    parameters: Sequence[torch.Tensor],
    retain: Sequence[torch.Tensor],
    alpha: float,
    gamma: float,
    present: torch.Tensor | None,
) -> None:
    """Write ``gamma g + alpha R``; a gradient that was None appears only where R is not zero."""
    for index, (parameter, row) in enumerate(zip(parameters, retain, strict=True)):
        if parameter.grad is None:
            wanted = bool(row.any()) if present is None else bool(present[index])
            if alpha == 0 or not wanted:
                continue
            parameter.grad = torch.zeros_like(parameter)
        g = local(parameter.grad)
        if alpha == 0:
            if gamma != 1:
                g.mul_(gamma)
            continue
        part = row.to(g.device).reshape(g.shape)
        if g.dtype == part.dtype:
            g.mul_(gamma).add_(part, alpha=alpha)
        else:
            g.copy_(gamma * g.to(part.dtype) + alpha * part)
