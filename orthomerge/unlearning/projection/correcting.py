"""Stage B: correct the update that an optimizer realised so that protected losses do not rise.

Momentum, weight decay, clipping and moving denominators are all in the update, and none of them
respects what was done to a gradient; only a correction after the step does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orthomerge.unlearning.projection.cones import ConeInfo
from orthomerge.unlearning.projection.removing import (
    TOLERANCE,
    Scales,
    masked,
    relative_residual,
)
from orthomerge.unlearning.projection.rows import Rows
from orthomerge.unlearning.projection.scopes import local
from orthomerge.unlearning.projection.settings import ProjectionSettings
from orthomerge.unlearning.projection.solving import Grouped, grouped, solve_groups

__all__ = ["Adjustment", "Snapshot", "correct_update"]

_PASSES = 2  # the first leaves rounding in float32, the second removes it


class Snapshot:
    """Copies of parameters before a step, and the update since then.

    Args:
        parameters: Parameters whose local parts are copied.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = [local(parameter) for parameter in parameters]
        self._saved = [own.clone() for own in self.parameters]

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(copy.numel() * copy.element_size() for copy in self._saved)

    @property
    def half(self) -> bool:
        """Whether any parameter is stored in half precision."""
        return any(copy.dtype.itemsize == 2 for copy in self._saved)

    def take(self) -> None:
        """Copy the parameters' current values into the copies."""
        torch._foreach_copy_(self._saved, self.parameters)

    def restore(self) -> None:
        """Put the copied values back."""
        torch._foreach_copy_(self.parameters, self._saved)

    def delta(self, index: int) -> torch.Tensor:
        """Return ``theta - saved`` of one parameter, flat, in at least float32."""
        own, saved = self.parameters[index], self._saved[index]
        wide = torch.promote_types(own.dtype, torch.float32)
        return (own.to(wide) - saved.to(wide)).reshape(-1)

    def write(self, index: int, delta: torch.Tensor) -> None:
        """Store ``saved + delta``, rounded once to the parameter's dtype."""
        own, saved = self.parameters[index], self._saved[index]
        own.copy_(saved.to(delta.dtype) + delta.reshape(own.shape))


@dataclass(slots=True)
class Adjustment:
    """What stage B did.

    Attributes:
        before: Products of rows and proposed update, summed over everything.
        after: The same for the stored update.
        info: Facts of the first solve; None when the update was safe.
        residual: Largest forbidden cosine, per group and row, of the stored update.
        correction: Norm of the first correction relative to the proposed update's.
        quantised: Share of corrected entries that storage rounded to no update; None in float32.
        changed: Whether any parameter was written.
        missed: Whether the constraints, or the decrease that was asked for, were out of reach.
    """

    before: Grouped
    after: Grouped
    info: ConeInfo | None = None
    residual: float = 0.0
    correction: float = 0.0
    quantised: float | None = None
    changed: bool = False
    missed: bool = False


def correct_update(
    rows: Rows,
    snapshot: Snapshot,
    groups: torch.Tensor,
    active: torch.Tensor,
    settings: ProjectionSettings,
    *,
    P: Scales = None,
    restoring: tuple[int, float] = (0, 0.0),
    proposed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Adjustment:
    """Replace the update by ``Delta - P G lam`` with ``G^T Delta <= -c`` (cone) or ``= -c``.

    c is zero but for one row, whose share in each tensor is in proportion to its squared gradient
    there: ``c_t = c ||g_t||^2 / ||g||^2``, which asks every tensor for the same relative step
    along its own gradient. An update that is safe already is left as it is, bit for bit. The
    optimizer's state stays that of the proposed update.

    Args:
        rows: Protected rows.
        snapshot: Parameters before the step.
        groups: Group of every parameter.
        active: Slots that are protected.
        settings: Mode and cut-off.
        P: Flat positive scales per parameter.
        restoring: Slot of the row with an offset, and c.
        proposed: Products of the rows with the proposed update and its squared norms per
            parameter, if they are known.
    """
    euclid = rows.gram()
    b, norms = rows.against(snapshot.delta) if proposed is None else proposed
    first = masked(grouped(euclid, b, norms, groups), active)
    asked = masked(grouped(euclid, _offsets(euclid, *restoring), norms, groups), active).b
    K = euclid if P is None else rows.gram(P)
    hard = settings.delta_mode == "hard"
    found = Adjustment(first.total(), first.total())
    current = (b, norms)
    for attempt in range(1 + _PASSES):
        measured = masked(grouped(euclid, *current, groups), active)
        residual = _violations(measured, asked, first, hard)
        if attempt == 0:
            wrong = (measured.b + asked != 0) if hard else (measured.b + asked > 0)
            todo = wrong.any(-1)
        else:
            todo = residual > TOLERANCE
        if not bool(todo.any()) or attempt == _PASSES:
            break
        problem = masked(grouped(K, current[0], norms, groups), active)
        problem = Grouped(problem.K, problem.b + asked, problem.norms)
        lam, info = solve_groups(problem, "hard" if hard else "cone", rtol=settings.cutoff)
        lam = lam.where(todo[:, None], torch.zeros(()).double())
        current = _apply(rows, snapshot, lam[groups], P, current, found)
        if attempt == 0:
            found.info = info
    found.after = measured.total()
    found.residual = float(residual.max()) if len(residual) else 0.0
    found.missed = found.info is not None and bool(
        (found.info.violation > 1e-6 * first.norms.sqrt()).any() or ~found.info.converged.all()
    )
    return found


def _offsets(K: torch.Tensor, slot: int, decrease: float) -> torch.Tensor:
    """Return every tensor's share of the decrease asked of one row, [tensors, slots]."""
    offsets = torch.zeros(K.shape[:2], dtype=torch.float64)
    squares = K[:, slot, slot]
    if decrease > 0 and float(squares.sum()) > 0:
        offsets[:, slot] = decrease * squares / squares.sum()
    return offsets


def _violations(measured: Grouped, asked: torch.Tensor, first: Grouped, hard: bool) -> torch.Tensor:
    shifted = Grouped(measured.K, measured.b + asked, measured.norms)
    return relative_residual(shifted, first.norms, hard=hard, ascent=False)


def _apply(
    rows: Rows,
    snapshot: Snapshot,
    lam: torch.Tensor,
    P: Scales,
    current: tuple[torch.Tensor, torch.Tensor],
    found: Adjustment,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the corrected updates of the tensors that need it; return products as stored."""
    affected = (lam != 0).any(-1).nonzero()[:, 0].tolist()
    tallies = {  # squared correction, wanted entries and lost ones
        device: torch.zeros(3, dtype=torch.float64, device=device)
        for device in {own.device for own in snapshot.parameters}
    }

    def corrected(index: int) -> torch.Tensor:
        correction = rows.combination(index, lam[index], P)
        delta = snapshot.delta(index)
        wide = torch.promote_types(delta.dtype, correction.dtype)
        wanted = delta.to(wide) - correction
        snapshot.write(index, wanted)
        stored = snapshot.delta(index)
        tally = tallies[stored.device]
        tally[0] += torch.linalg.vector_norm(correction, dtype=torch.float64) ** 2
        if snapshot.half:
            tally[1] += (wanted != 0).sum()
            tally[2] += ((wanted != 0) & (stored == 0)).sum()
        return stored

    b, norms = rows.against(corrected, only=affected)
    hit = torch.zeros(len(lam), dtype=torch.bool)
    hit[affected] = True
    merged = torch.where(hit[:, None], b, current[0]), torch.where(hit, norms, current[1])
    counted = torch.stack([tally.cpu() for tally in tallies.values()]).sum(0)
    square, moving, lost = rows.total(counted).tolist()
    if not found.changed and affected:
        total = float(current[1].sum())
        found.correction = (square / total) ** 0.5 if total > 0 else 0.0
    if snapshot.half:
        found.quantised = lost / max(1.0, moving)
    found.changed = found.changed or bool(affected)
    return merged
