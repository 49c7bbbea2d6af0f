"""Stage A: remove from the forget gradient what would move protected losses.

Works in place on gradients; whose rows are protected and when is the projector's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orthomerge.unlearning.projection.cones import ConeInfo, ConeMode
from orthomerge.unlearning.projection.rows import Rows
from orthomerge.unlearning.projection.scopes import local
from orthomerge.unlearning.projection.settings import ProjectionSettings
from orthomerge.unlearning.projection.solving import (
    Grouped,
    grouped,
    signed_coefficients,
    solve_groups,
)

__all__ = ["Removal", "flat_gradient", "masked", "relative_residual", "remove_tangent"]

TOLERANCE = 1e-7  # cosine above which a pass of refinement is worth its time
_PASSES = 1  # of refinement
_LEAST = 1e-3  # share of the first norm that residuals are measured against at least

Scales = Sequence[torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Removal:
    """What stage A did.

    Attributes:
        before: Products before, per group.
        after: Products after, as stored in the gradients.
        info: Facts of the first solve; None when nothing was solved.
        residual: See ``relative_residual``.
        retain_product: Product of the window's retain gradient with the corrected gradient.
    """

    before: Grouped
    after: Grouped
    info: ConeInfo | None
    residual: float
    retain_product: float

    @property
    def kept(self) -> float:
        """Kept fraction of the gradient's norm; 1 for a zero gradient."""
        first, last = float(self.before.norms.sum()), float(self.after.norms.sum())
        return (last / first) ** 0.5 if first > 0 else 1.0


def masked(problem: Grouped, active: torch.Tensor) -> Grouped:
    """Return a problem in which inactive rows are zero; active [slots]."""
    K = problem.K.where(active[:, None] & active, torch.zeros(()).double())
    return Grouped(K, problem.b.where(active, torch.zeros(()).double()), problem.norms)


def relative_residual(
    problem: Grouped, first: torch.Tensor, *, hard: bool, ascent: bool
) -> torch.Tensor:
    """Return the largest forbidden cosine per group, [groups].

    The vector's norm counts as at least a thousandth of what it was at first, so that a remainder
    of pure rounding is not called a violation.
    """
    lengths = torch.maximum(problem.norms, _LEAST**2 * first).sqrt()
    scales = problem.K.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt() * lengths[:, None]
    forbidden = problem.b.abs() if hard else (-problem.b if ascent else problem.b)
    cosines = torch.where(scales > 0, forbidden / scales.where(scales > 0, torch.ones(())), 0.0)
    return cosines.clamp(min=0).amax(-1)


def remove_tangent(
    rows: Rows,
    parameters: Sequence[torch.Tensor],
    groups: torch.Tensor,
    active: torch.Tensor,
    retain_slot: int,
    settings: ProjectionSettings,
    P: Scales,
    problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Removal:
    """Replace every ``.grad`` by ``g - strength * G lam`` and measure what is left.

    Args:
        rows: Protected rows.
        parameters: Parameters whose gradients are changed; None counts as zero.
        groups: Group of every parameter.
        active: Slots that are protected.
        retain_slot: Slot of the window's retain gradient, for the sign-aware rule.
        settings: Mode, cut-off, strength and margin.
        P: Flat preconditioner per parameter.
        problem: K, b and norms per parameter, as ``Rows.measure`` returned them.
    """
    K = problem[0]
    before = masked(grouped(*problem, groups), active)
    hard = settings.mode == "hard"
    lam, info = _coefficients(before, settings, K, groups, active, retain_slot)
    lam = settings.strength * lam
    after, stored = before, (problem[1], problem[2])
    exact = hard or settings.mode in ("cone", "conflict")
    precise = all(parameter.dtype.itemsize >= 4 for parameter in parameters)
    passes = _PASSES if exact and precise and settings.strength == 1 and not settings.margin else 0
    for remaining in range(passes, -1, -1):
        if bool((lam != 0).any()):
            stored = _subtract(rows, parameters, lam[groups], P, K, stored)
            after = masked(grouped(K, *stored, groups), active)
        residual = relative_residual(after, before.norms, hard=hard, ascent=True)
        worst = float(residual.max()) if len(residual) else 0.0
        if not remaining or worst <= TOLERANCE:
            break
        lam, _ = solve_groups(after, "hard" if hard else "cone", rtol=settings.cutoff, ascent=True)
        lam = lam.where(residual[:, None] > TOLERANCE, torch.zeros(()).double())
    retain = grouped(K, stored[0], stored[1], groups).total().b[0, retain_slot]
    return Removal(before, after, info, worst, float(retain))


def _coefficients(
    problem: Grouped,
    settings: ProjectionSettings,
    K: torch.Tensor,
    groups: torch.Tensor,
    active: torch.Tensor,
    retain_slot: int,
) -> tuple[torch.Tensor, ConeInfo | None]:
    if settings.mode == "sign":
        total = grouped(K, K[:, :, retain_slot], K[:, retain_slot, retain_slot], groups)
        retain = masked(total, active).b
        return signed_coefficients(problem, retain, rtol=settings.cutoff), None
    mode: ConeMode = "hard" if settings.mode == "hard" else "cone"
    return solve_groups(problem, mode, rtol=settings.cutoff, ascent=True, floor=settings.margin)


def _subtract(
    rows: Rows,
    parameters: Sequence[torch.Tensor],
    lam: torch.Tensor,
    P: Scales,
    K: torch.Tensor,
    known: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Subtract ``G lam`` from the gradients, and measure each one while it is in the cache."""
    hit = (lam * K.diagonal(dim1=-2, dim2=-1) != 0).any(-1)

    def corrected(index: int) -> torch.Tensor:
        parameter = parameters[index]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        target = local(parameter.grad)
        g = target.reshape(-1)
        tangent = rows.combination(index, lam[index])
        if g.data_ptr() == target.data_ptr() and g.dtype == tangent.dtype:
            return g.sub_(tangent)
        target.copy_((g.to(tangent.dtype) - tangent).reshape(target.shape))
        return target.reshape(-1)

    b, norms = rows.against(corrected, P, only=hit.nonzero()[:, 0].tolist())
    return torch.where(hit[:, None], b, known[0]), torch.where(hit, norms, known[1])


def flat_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Return the local gradient as a flat vector; zeros, without memory, if there is none."""
    if parameter.grad is None:
        own = local(parameter)
        return own.new_zeros(1).expand(own.numel())
    return local(parameter.grad).reshape(-1)
