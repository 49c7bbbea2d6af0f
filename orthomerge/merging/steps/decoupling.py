"""Orthogonal-residual decoupling of one layer: fit rotations, gate them, merge both parts.

The method's registration and its formula are in ``methods/orthomerge_decoupled``; the fits and the
averages are ``linalg``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from orthomerge.linalg.blocks import rotate_columns
from orthomerge.linalg.logarithms import exp_so
from orthomerge.linalg.means import AlgebraMerge, AlgebraSum, Correction
from orthomerge.linalg.procrustes_fits import ProcrustesFit, procrustes_right
from orthomerge.linalg.procrustes_frames import ProcrustesBase
from orthomerge.linalg.rotations import apply_cayley
from orthomerge.merging.draws import Draws
from orthomerge.merging.nesting import run_nested
from orthomerge.merging.registry import Merged
from orthomerge.merging.roles import Role, rotated_roles
from orthomerge.merging.steps.modes import resolved
from orthomerge.merging.steps.rotating import residual_over_noise

__all__ = ["Decoupled", "Settings", "decouple", "merge_decoupled", "residual_of"]


@dataclass(frozen=True)
class Settings:
    """The method's parameters, with everything decided that the mode decides."""

    mode: str
    variant: str
    residual: Mapping[str, Any]
    gate: bool
    margin: float
    strength: float
    correction: Correction
    c_max: float
    zero_guard: float
    anchor: float
    block: int | None
    chart: Literal["cayley", "log"]
    roles: frozenset[Role]

    @classmethod
    def of(cls, parameters: Mapping[str, Any], models: int) -> Settings:
        """Fill in what was left to the mode, for a number of models."""
        parameters = resolved(parameters, models)
        roles = rotated_roles(
            include_embeddings=parameters["include_embeddings"],
            rotate_conv=parameters["rotate_conv"],
        )
        return cls(
            mode=parameters["mode"],
            variant=parameters["variant"],
            residual=parameters["residual"],
            gate=parameters["gate"] == "auto",
            margin=parameters["margin"],
            strength=parameters["strength"],
            correction=parameters["correction"],
            c_max=parameters["c_max"],
            zero_guard=parameters["zero_guard"],
            anchor=parameters["anchor"],
            block=parameters["block"] or None,
            chart=parameters["chart"],
            roles=roles,
        )


@dataclass
class Decoupled:
    """What one layer's updates were split into.

    Args:
        fits: Each model's rotation; None where the gate or a zero update left it out.
        residuals: What is left of each model, W_i - W_0 R_i.
        facts: Per model, how well the rotation fitted.
    """

    fits: list[ProcrustesFit | None] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)


def merge_decoupled(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    settings: Settings,
    role: str,
    survey: Any = None,
    draws: Draws | None = None,
) -> Merged:
    """Merge one layer: rotations in the Lie algebra, residuals by the nested method."""
    if not any(bool(delta.any()) for delta in deltas):
        return Merged(base.clone())
    if role == "stack" and role in settings.roles:
        parts = [
            _merge_rotations(W0, [d[at] for d in deltas], weights, settings, "linear")
            for at, W0 in enumerate(base)
        ]
        rotated = torch.stack([part[0] for part in parts])
        residuals = [torch.stack(each) for each in zip(*(part[1] for part in parts), strict=True)]
        facts: dict[str, Any] = {"stack": [part[2] for part in parts]}
    else:
        rotated, residuals, facts = _merge_rotations(base, deltas, weights, settings, role)
    nested = {"weights": weights, "role": role, "survey": survey, "draws": draws}
    return Merged(run_nested(settings.residual, rotated, residuals, **nested), facts)


def _merge_rotations(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings, role: str
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """Return W_0 R with the merged R, what is left of each model, and facts, for one matrix."""
    split = decouple(base, deltas, settings, role)
    rotated, merge = _rotate(base, split.fits, weights, settings)
    facts: dict[str, Any] = {"models": split.facts} if split.facts else {}
    if merge is not None:
        moved = torch.linalg.vector_norm(rotated - base) / torch.linalg.vector_norm(base)
        facts |= {"correction": merge.factors, "merged_norm": merge.merged_norm}
        facts |= {"capped": merge.capped, "zeroed": merge.zeroed, "moved": float(moved)}
    return rotated, split.residuals, facts


def residual_of(
    base: Tensor, deltas: Sequence[Tensor], settings: Settings, role: str, model: int
) -> Tensor:
    """Return what one model leaves to the residual method; of a stack, matrix by matrix."""
    if role != "stack" or role not in settings.roles:
        return decouple(base, deltas, settings, role, only=model).residuals[0]
    parts = [
        decouple(W0, [d[at] for d in deltas], settings, "linear", only=model).residuals[0]
        for at, W0 in enumerate(base)
    ]
    return torch.stack(parts)


def decouple(
    base: Tensor,
    deltas: Sequence[Tensor],
    settings: Settings,
    role: str,
    *,
    only: int | None = None,
) -> Decoupled:
    """Split each model's update into a rotation of the base and what is left.

    Args:
        base: W_0, any shape but a stack, whose matrices are split one by one.
        deltas: D_i, of its shape.
        settings: The method's settings.
        role: What the tensor is; those the settings do not rotate are left as they are.
        only: Split this model's update alone.
    """
    chosen = range(len(deltas)) if only is None else [only]
    if role not in settings.roles or not bool(base.any()):
        return Decoupled([None] * len(chosen), [deltas[at] for at in chosen])
    W0 = base.reshape(base.shape[0], -1)
    flat = [delta.reshape(W0.shape) for delta in deltas]
    mean = sum(flat[1:], flat[0]) / len(flat) if settings.variant == "conflict-aware" else None
    split, prepared = Decoupled(), ProcrustesBase(W0)
    for at in chosen:
        fit, residual, facts = _split_one(prepared, flat[at], mean, settings)
        split.fits.append(fit)
        split.residuals.append(residual.reshape(base.shape))
        split.facts.append(facts)
    return split


def _split_one(
    base: ProcrustesBase, delta: Tensor, mean: Tensor | None, settings: Settings
) -> tuple[ProcrustesFit | None, Tensor, dict[str, Any]]:
    """Return (rotation or None, residual, facts) of one model."""
    W0 = base.weight
    target = delta
    facts: dict[str, Any] = {"rotated": False}
    if mean is not None:
        opposed = (delta * mean).sum(dim=1) < 0
        facts["conflict_rows"] = int(opposed.sum())
        target = torch.where(opposed[:, None], delta, 0.0)
    size = float(torch.linalg.vector_norm(target))
    if size == 0.0:
        return None, delta, facts
    fit = procrustes_right(
        base,
        W0 + target,
        anchor=settings.anchor,
        block=settings.block,
        null="svd" if settings.mode == "reproduce" else "identity",
    )
    noise, rotational = residual_over_noise(
        fit.residual, size, W0.shape, settings.block, settings.margin
    )
    facts |= {"residual_fraction": fit.residual / size, "residual_over_noise": noise}
    facts["retries"] = fit.retries
    if settings.gate and not rotational:
        return None, delta, facts
    facts["rotated"] = True
    rotated = fit.apply(W0) if fit.rotated is None else fit.rotated
    return replace(fit, rotated=None), (W0 - rotated) + delta, facts


def _rotate(
    base: Tensor,
    fits: Sequence[ProcrustesFit | None],
    weights: Sequence[float],
    settings: Settings,
) -> tuple[Tensor, AlgebraMerge | None]:
    """Return W_0 R with R the merged rotation; W_0 itself where nothing rotates.

    A model without a rotation counts as the identity: its weight stays in the mean.
    """
    if not any(fits):
        return base, None
    algebra, unrotated = AlgebraSum(), 0.0
    for fit, weight in zip(fits, weights, strict=True):
        if fit is None:
            unrotated += weight
        else:
            A = fit.generator(settings.chart)
            algebra.add(A, weight)
    if unrotated:
        algebra.add(torch.zeros_like(A), unrotated)
    A, merge = algebra.merged(
        strength=settings.strength,
        correction=settings.correction,
        c_max=settings.c_max,
        zero_guard=settings.zero_guard,
    )
    W0 = base.reshape(base.shape[0], -1).to(A.dtype)
    rotated = _apply_exp(W0, A) if settings.chart == "log" else apply_cayley(W0, A)
    return rotated.reshape(base.shape).to(base.dtype), merge


def _apply_exp(W0: Tensor, L: Tensor) -> Tensor:
    R = exp_so(L)
    return W0 @ R if R.ndim == 2 else rotate_columns(W0, R)
