"""One line on what a diagnosis means: is this fine-tune rotational, will rotating matter.

Thresholds are constants here and explained in docs/diagnose.md; nothing is measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orthomerge.diagnostics.measurements import Diagnosis, LayerGeometry, ModelGeometry
from orthomerge.linalg.procrustes_anchors import rotational_limit

__all__ = ["EXACT", "MARGIN", "MATTERS", "SERIES", "Verdict", "judge"]

#: A change is rotational below ``(1 - MARGIN) x noise level``, as the gate of orthomerge-decoupled.
MARGIN = 0.1
#: ... and by this many standard deviations of noise in a layer of its size, which matters only in
#: Below this fraction of the noise level a change is a rotation and nothing else.
EXACT = 0.05
#: Fraction of all changes (squared norms) that must be in rotational updates for it to matter.
MATTERS = 0.1
#: Distance from orthogonality from which a truncated series is no rotation to speak of.
SERIES = 1e-2

Kind = Literal["unchanged", "rotation", "rotational", "partly-rotational", "not-rotational"]


@dataclass(frozen=True)
class Verdict:
    """What the measurements say.

    Attributes:
        kind: ``rotation`` (nothing but one), ``rotational`` (at least half of the change is in
            rotational updates), ``partly-rotational`` (less, but at least ``MATTERS``),
            ``not-rotational``, or ``unchanged``.
        matters: Whether merging rotations will differ from merging the residuals alone.
        rotational_layers: Layers that at least one model rotates.
        changed_layers: Layers that at least one model changes.
        rotational_updates: Pairs of a model and a layer that are rotational.
        changed_updates: Pairs with a change.
        by_model: How many layers are rotational in each model, in order.
        share: Fraction of ``Σ ‖D‖²`` in rotational updates; None without a base.
        text: The line.
    """

    kind: Kind
    matters: bool
    rotational_layers: int
    changed_layers: int
    rotational_updates: int
    changed_updates: int
    by_model: tuple[int, ...]
    share: float | None
    text: str


def judge(diagnosis: Diagnosis, margin: float = MARGIN) -> Verdict:
    """Say in one line what a diagnosis means.

    An update (one model, one layer) is rotational if its residual fraction is below
    ``min(1 - margin, max(1 - 3 σ, 0.05))`` times b, what isotropic noise would leave;
    ``σ = sqrt((1 - b²) / (2 b² o n))`` is the relative spread of noise in a layer [o, n].

    Args:
        diagnosis: The measurements.
        margin: How clearly an update must beat noise.
    """
    if diagnosis.base is None:
        return _of_adapters(diagnosis)
    changed = [
        (layer, model) for layer in diagnosis.layers for model in layer.models if _over(model)
    ]
    turned = [(layer, model) for layer, model in changed if _rotational(layer, model, margin)]
    sizes = [_energy(layer, model) for layer, model in changed]
    share = math.fsum(_energy(*pair) for pair in turned) / (math.fsum(sizes) or 1.0)
    kind = _kind(changed, share)
    layers = len({layer.name for layer, _ in changed})
    rotational = len({layer.name for layer, _ in turned})
    by_model = tuple(
        sum(_rotational(layer, layer.models[at], margin) for layer in diagnosis.layers)
        for at in range(len(diagnosis.models))
    )
    return Verdict(
        kind=kind,
        matters=kind not in ("unchanged", "not-rotational"),
        rotational_layers=rotational,
        changed_layers=layers,
        rotational_updates=len(turned),
        changed_updates=len(changed),
        by_model=by_model,
        share=share,
        text=_text(kind, changed, turned, share, by_model),
    )


_Updates = Sequence[tuple[LayerGeometry, ModelGeometry | None]]


def _kind(changed: _Updates, share: float) -> Kind:
    if not changed:
        return "unchanged"
    if all(_below(model, EXACT) for _, model in changed):
        return "rotation"
    if share < MATTERS:
        return "not-rotational"
    return "rotational" if share >= 0.5 else "partly-rotational"


def _text(
    kind: Kind, changed: _Updates, turned: _Updates, share: float, by_model: Sequence[int]
) -> str:
    layers = len({layer.name for layer, _ in changed})
    if kind == "unchanged":
        return "No measured layer differs from the base: there is nothing to merge."
    over = [model.over_noise or 0.0 for _, model in changed if model is not None]
    if kind == "not-rotational":
        found = f"{len({layer.name for layer, _ in turned})} of {layers} layers"
        where = f"rotational only in {found}, with {share:.0%} of the change" if turned else ""
        left = f"rotations leave {_range(over)} times what they leave of noise"
        return f"Not rotational ({where or left}): the rotation part will not matter; use tsv-m."
    angle = max(model.largest_angle for _, model in turned if model is not None)
    moved = statistics.median(layer.merged.moved or 0.0 for layer, _ in turned)
    effect = f"merging turns them by up to {angle:.3g}° per model and moves them by {moved:.1%}"
    if kind == "rotation":
        return (
            f"An exact rotation of the base in all {layers} changed layers (residual at most "
            f"{max(over):.2g} of noise): {effect}; merge the rotations, orthomerge-decoupled."
        )
    found = f"{len({layer.name for layer, _ in turned})} of {layers} layers"
    pairs = f" (by model {', '.join(map(str, by_model))})" if len(by_model) > 1 else ""
    head = f"Rotational in {found}{pairs}, with {share:.0%} of the change"
    if kind == "partly-rotational":
        head = f"Partly rotational: in {found}{pairs}, with {share:.0%} of the change"
    return f"{head}: {effect}; the rotation part will matter there, use orthomerge-decoupled."


def _of_adapters(diagnosis: Diagnosis) -> Verdict:
    """Judge adapters that are rotations by construction."""
    pairs = [(layer, model) for layer in diagnosis.layers for model in layer.models if model]
    turned = [(layer, model) for layer, model in pairs if model.generator_norm > 0]
    layers = len({layer.name for layer, _ in turned})
    by_model = tuple(
        sum(bool(model and model.generator_norm) for model in column)
        for column in zip(*(layer.models for layer in diagnosis.layers), strict=True)
    )
    kind: Kind = "rotation" if turned else "unchanged"
    if turned:
        angle = max(model.largest_angle for _, model in turned)
        c = statistics.median(layer.correction for layer, _ in turned)
        error = max(model.orthogonality for _, model in turned)
        series = f"; but a truncated series is off by {error:.1g}" if error > SERIES else ""
        text = (
            f"Rotations by construction in {layers} modules, up to {angle:.3g}°, median "
            f"correction c = {c:.3g}{series}: merge them with orthomerge."
        )
    else:
        text = "No module is rotated: the adapters are untrained, there is nothing to merge."
    counts = (layers, layers, len(turned), len(turned))
    return Verdict(kind, bool(turned), *counts, by_model, None, text)


def _over(model: ModelGeometry | None) -> bool:
    return model is not None and model.over_noise is not None


def _below(model: ModelGeometry | None, limit: float) -> bool:
    return model is not None and model.over_noise is not None and model.over_noise < limit


def _rotational(layer: LayerGeometry, model: ModelGeometry | None, margin: float) -> bool:
    if model is None or not model.noise_level:
        return False
    return _below(model, rotational_limit(model.noise_level, layer.parameters, margin))


def _energy(layer: LayerGeometry, model: ModelGeometry | None) -> float:
    if model is None or model.change is None or layer.base_norm is None:
        return 0.0
    return (model.change * layer.base_norm) ** 2


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
