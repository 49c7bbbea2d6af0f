"""Measure how fine-tunes moved their base: layer by layer, with one layer in memory at a time.

Each change is split into the rotation of the input side that explains it best and a residual. Which
layers are measured is decided in ``survey``; what the numbers say is said in ``verdict``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orthomerge.checkpoints.sources import CheckpointSource
from orthomerge.diagnostics.generators import (
    angle_facts,
    cosines,
    measure_module,
    merge_generators,
)
from orthomerge.diagnostics.measurements import (
    Diagnosis,
    EnergyGeometry,
    LayerGeometry,
    ModelGeometry,
)
from orthomerge.diagnostics.survey import Survey, SurveyedLayer, plan_survey
from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import frobenius, orthogonality
from orthomerge.linalg.devices import require_device
from orthomerge.linalg.energy import hyperspherical_energy
from orthomerge.linalg.precision import full_precision
from orthomerge.linalg.procrustes_anchors import residual_noise_baseline
from orthomerge.linalg.procrustes_fits import ProcrustesFit, procrustes_right
from orthomerge.linalg.procrustes_frames import ProcrustesBase
from orthomerge.linalg.rotations import apply_cayley, inverse_cayley

__all__ = ["Settings", "diagnose", "measure", "measure_weight"]


@dataclass(frozen=True)
class Settings:
    """How layers are measured.

    Attributes:
        anchor: Relative anchor of the fits at the identity.
        block: Size of the diagonal blocks that rotations are restricted to; None for dense ones.
        max_rows: Rows that the hyperspherical energy samples.
        device: Where to compute.
    """

    anchor: float = 1e-3
    block: int | None = None
    max_rows: int = 2048
    device: str = "cpu"


def diagnose(
    models: Sequence[CheckpointSource],
    base: CheckpointSource | None = None,
    *,
    anchor: float = 1e-3,
    block: int | None = None,
    include_embeddings: bool = False,
    max_rows: int = 2048,
    layers: str | None = None,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Diagnosis:
    """Measure the geometry of fine-tunes, layer by layer.

    With a base, for every linear layer: ``R_i = argmin ‖W0 R - W_i‖² + λ‖R - I‖²``, its angles, the
    residual fraction ``‖W_i - W0 R_i‖ / ‖W_i - W0‖`` beside what isotropic noise would leave, and
    the rotation that the R_i merge to. Without one, adapters that rotate are measured from their
    generators.

    Args:
        models: Full checkpoints or adapters, mixed as you like.
        base: What they were fine-tuned from.
        anchor: λ relative to ``‖W0‖² / n``; 1e-3 keeps ill-conditioned layers from turning far.
        block: Restrict rotations to diagonal blocks of this size.
        include_embeddings: Measure embeddings and output heads too.
        max_rows: Rows that the hyperspherical energy samples.
        layers: Glob over tensor names (module names without a base).
        device: Where to compute.
        advance: Called with the bytes read after each layer.

    Returns:
        The measurements. ``judge`` says in one line what they mean.

    Raises:
        CheckpointError: A model cannot be opened, lacks a layer, or has it in another shape.
        AdapterError: An adapter is malformed or does not fit.
        RecipeError: A base is needed, no layer matches, or the block size does not divide one.
        NumericalError: A tensor is not finite.
        BudgetError: There is no such device.

    >>> turned = {"w": torch.tensor([[0.0, 1.0], [-2.0, 0.0]])}
    >>> found = diagnose([turned], {"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]])})
    >>> round(found.layers[0].models[0].largest_angle)
    90
    """
    survey = plan_survey(
        models, base, layers=layers, include_embeddings=include_embeddings, block=block
    )
    return measure(survey, Settings(anchor, block, max_rows, device), advance)


def measure(
    survey: Survey, settings: Settings, advance: Callable[[int], None] | None = None
) -> Diagnosis:
    """Measure the layers of a survey; ``diagnose`` explains arguments and errors."""
    require_device(settings.device)
    skipped = survey.skipped.copy()
    found: list[LayerGeometry] = []
    for layer in survey.layers:
        before = len(found)
        found += _measure_layer(survey, layer, settings)
        if len(found) == before:
            skipped["that are zero in the base"] += 1
        if advance is not None:
            advance(layer.read_bytes)
    return Diagnosis(
        models=tuple(source.origin for source in survey.sources),
        kinds=tuple(source.description for source in survey.sources),
        base=None if survey.base is None else survey.base.origin,
        settings={
            "anchor": settings.anchor,
            "block": settings.block,
            "max_rows": settings.max_rows,
            "device": settings.device,
        },
        layers=tuple(found),
        skipped=dict(skipped),
    )


def _measure_layer(
    survey: Survey, layer: SurveyedLayer, settings: Settings
) -> Iterator[LayerGeometry]:
    if survey.base is None:
        adapters = [source.rotations for source in survey.sources if source.rotations is not None]
        yield measure_module(layer.name, adapters, settings.device)
        return
    raw = survey.base.checkpoint.read(layer.name)
    dtype = torch.float64 if raw.dtype == torch.float64 else torch.float32
    W0 = _finite(raw.to(settings.device, dtype), survey.base.origin, layer.name)
    deltas = []
    for source, part in zip(survey.sources, layer.parts, strict=True):
        D = torch.zeros_like(W0) if part is None else part.delta(W0, tuple(W0.shape), dtype)
        deltas.append(_finite(D, source.origin, layer.name))
    if layer.role != "stack":
        if bool(W0.any()):
            yield measure_weight(layer.name, W0, deltas, settings)
        return
    for at, matrix in enumerate(W0):
        if bool(matrix.any()):
            yield measure_weight(f"{layer.name}[{at}]", matrix, [D[at] for D in deltas], settings)


def _finite(X: Tensor, origin: str, name: str) -> Tensor:
    if not bool(X.isfinite().all()):
        raise NumericalError(
            "holds NaN or infinite values",
            file=origin,
            tensor=name,
            remedy="The file is damaged or its training diverged; leave the model out.",
        )
    return X


@full_precision()
def measure_weight(
    name: str, W0: Tensor, deltas: Sequence[Tensor], settings: Settings
) -> LayerGeometry:
    """Measure one weight and its changes.

    Args:
        name: The layer's name.
        W0: The base weight [o, n], not zero.
        deltas: The changes, of its shape.
        settings: How to measure.
    """
    base = ProcrustesBase(W0)
    mean = sum(deltas[1:], deltas[0]) / len(deltas)
    models, generators = [], []
    for D in deltas:
        fit = procrustes_right(base, W0 + D, anchor=settings.anchor, block=settings.block)
        opposed = int(((D * mean).sum(dim=-1) < 0).sum())
        models.append(_describe(fit, D, base, opposed, settings))
        generators.append(fit.generator())
    merge = merge_generators(generators)
    rotated = apply_cayley(W0, merge.generator)
    changes = [model.change or 0.0 for model in models]
    return LayerGeometry(
        name=name,
        shape=tuple(W0.shape),
        models=tuple(models),
        base_norm=base.norm,
        condition=_condition(W0),
        correction=merge.correction,
        agreement=merge.agreement,
        generator_cosines=cosines(generators),
        change_cosines=cosines(deltas),
        merged=replace(
            merge.merged,
            moved=float(frobenius(rotated - W0)) / base.norm,
            mean_change=math.fsum(changes) / len(changes),
        ),
        energy=_energy(W0, rotated, W0 + mean, settings.max_rows),
    )


def _describe(
    fit: ProcrustesFit, D: Tensor, base: ProcrustesBase, opposed: int, settings: Settings
) -> ModelGeometry:
    rows, columns = D.shape
    size = float(frobenius(D))
    width = settings.block or columns
    small = inverse_cayley(fit.core) if fit.skew is None else fit.skew
    return ModelGeometry(
        change=size / base.norm,
        residual_fraction=fit.residual / size if size else None,
        noise_level=residual_noise_baseline(rows, width),
        generator_norm=float(torch.linalg.vector_norm(frobenius(small))),
        orthogonality=orthogonality(fit.core)[1],
        anchor=fit.anchor,
        retries=fit.retries,
        conflict_rows=opposed,
        **angle_facts(small, columns // width * (width // 2)),
    )


def _condition(W: Tensor) -> float:
    """Return the condition number over the smaller side, through the Gram matrix in float64."""
    X = W.double() / W.abs().max()
    gram = X @ X.mT if X.shape[0] <= X.shape[1] else X.mT @ X
    values = torch.linalg.eigvalsh(gram)
    least, largest = float(values[0]), float(values[-1])
    noise = len(values) * torch.finfo(torch.float64).eps * largest
    return math.sqrt(largest / least) if least > noise else math.inf


def _energy(W0: Tensor, rotated: Tensor, mean: Tensor, max_rows: int) -> EnergyGeometry:
    first = hyperspherical_energy(W0, max_rows=max_rows)
    return EnergyGeometry(
        base=first.value,
        rotated=hyperspherical_energy(rotated, max_rows=max_rows).value,
        mean_merge=hyperspherical_energy(mean, max_rows=max_rows).value,
        rows=first.rows,
        zero_rows=first.zero_rows,
    )
