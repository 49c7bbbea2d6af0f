"""What a diagnosis holds: the geometry of each layer and of each model's part in it.

Plain numbers only; how they are measured is in ``geometry`` and ``generators``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ANGLE_EDGES",
    "Diagnosis",
    "EnergyGeometry",
    "LayerGeometry",
    "MergedGeometry",
    "ModelGeometry",
]

Cosines = tuple[tuple[float | None, ...], ...]

_BINS = 42
#: Edges of the angle histograms in degrees, logarithmic from 0.001 to 180; the first bin of a
#: histogram counts what lies below all of them.
ANGLE_EDGES = tuple(1e-3 * (180 / 1e-3) ** (at / _BINS) for at in range(_BINS + 1))


@dataclass(frozen=True)
class ModelGeometry:
    """One model's part in one layer.

    Angles are in degrees, one per plane, over all ``floor(b / 2)`` planes of every block (those
    that do not turn count as 0). Without a base only angles, norm, theta and orthogonality are
    known; the others are None.

    Attributes:
        change: ``‖D‖ / ‖W0‖``.
        residual_fraction: ``‖W - W0 R‖ / ‖D‖``; None where D = 0.
        noise_level: The residual fraction that isotropic noise of this shape leaves.
        generator_norm: ``‖A‖_F`` with ``R = Cayley(A)``.
        largest_angle: Largest rotation angle.
        mean_angle: Mean over all planes.
        obtuse_fraction: Fraction of planes turned by more than 90 degrees.
        angle_counts: How many planes have an angle below ``ANGLE_EDGES[0]``, then in each bin.
        orthogonality: ``‖RᵀR - I‖_F / √n`` of the rotation as the model applies it.
        anchor: The relative anchor finally used.
        retries: How often the anchor was raised.
        conflict_rows: Rows whose change opposes the mean change of all models.
        theta: ``‖A‖_2``, the size on which a truncated series' error depends; adapters only.
    """

    change: float | None = None
    residual_fraction: float | None = None
    noise_level: float | None = None
    generator_norm: float = 0.0
    largest_angle: float = 0.0
    mean_angle: float = 0.0
    obtuse_fraction: float = 0.0
    angle_counts: tuple[int, ...] = ()
    orthogonality: float = 0.0
    anchor: float | None = None
    retries: int | None = None
    conflict_rows: int | None = None
    theta: float | None = None

    @property
    def over_noise(self) -> float | None:
        """Residual fraction / noise level: 0 for a rotation, about 1 for noise; None if unknown."""
        if self.residual_fraction is None or not self.noise_level:
            return None
        return self.residual_fraction / self.noise_level


@dataclass(frozen=True)
class MergedGeometry:
    """The merged rotation R of one layer, ``R = Cayley(c/T Σ A_i)``.

    Attributes:
        generator_norm: ``‖A_m‖_F``.
        largest_angle: Largest angle, degrees.
        mean_angle: Mean over all planes, degrees.
        obtuse_fraction: Fraction of planes turned by more than 90 degrees.
        orthogonality: ``‖RᵀR - I‖_F / √n``.
        determinant: Its sign, +1 for a rotation.
        least_one_plus_cosine: ``min_k (1 + cos φ_k)``; near 0 the Cayley map ends.
        moved: ``‖W0 R - W0‖ / ‖W0‖``; None without a base.
        mean_change: Mean of ``‖D_i‖ / ‖W0‖``. ``moved`` far above it is a sign of junk angles.
    """

    generator_norm: float
    largest_angle: float
    mean_angle: float
    obtuse_fraction: float
    orthogonality: float
    determinant: int
    least_one_plus_cosine: float
    moved: float | None = None
    mean_change: float | None = None


@dataclass(frozen=True)
class EnergyGeometry:
    """Hyperspherical energy of the layer's rows, over the same sample of rows each time.

    Attributes:
        base: Of W0.
        rotated: Of W0 R with the merged R; equals ``base`` up to rounding.
        mean_merge: Of ``W0 + mean D_i``.
        rows: Rows that took part.
        zero_rows: Rows of W0 without a direction.
    """

    base: float
    rotated: float
    mean_merge: float
    rows: int
    zero_rows: int


@dataclass(frozen=True)
class LayerGeometry:
    """One weight, or one matrix of a stack of experts.

    Attributes:
        name: Tensor name, or module name of an adapter without a base.
        shape: Its shape; block count, block size, block size without a base.
        models: One entry per model, in order; None where an adapter lacks the module.
        base_norm: ``‖W0‖_F``.
        condition: Largest / smallest singular value of W0; inf if it is singular.
        correction: c, by which merging lengthens the sum of the generators; 0 if they cancel.
        agreement: ``‖Σ A_i‖ / Σ ‖A_i‖``: 1 for equal directions, 1/√T for unrelated ones.
        generator_cosines: Cosines of the angles between the A_i, T x T; None where one is zero.
        change_cosines: The same of the D_i.
        merged: The merged rotation.
        energy: Hyperspherical energies.
    """

    name: str
    shape: tuple[int, ...]
    models: tuple[ModelGeometry | None, ...]
    base_norm: float | None
    condition: float | None
    correction: float
    agreement: float | None
    generator_cosines: Cosines
    change_cosines: Cosines | None
    merged: MergedGeometry
    energy: EnergyGeometry | None

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Diagnosis:
    """Everything measured, layer by layer.

    Attributes:
        models: Origins of the models, in order.
        kinds: What they are, in words.
        base: Origin of the base.
        settings: What was asked for.
        layers: The measured layers.
        skipped: Why other tensors were left out -> how many.
        notes: What else to know, one sentence each.
    """

    models: tuple[str, ...]
    kinds: tuple[str, ...]
    base: str | None
    settings: dict[str, Any]
    layers: tuple[LayerGeometry, ...]
    skipped: dict[str, int]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything JSON-ready; what is not finite becomes null."""
        facts: dict[str, Any] = _plain(dataclasses.asdict(self))
        facts["angle_edges"] = list(ANGLE_EDGES)
        for layer, found in zip(self.layers, facts["layers"], strict=True):
            found["parameters"] = layer.parameters
            for model, entry in zip(layer.models, found["models"], strict=True):
                if model is not None:
                    entry["over_noise"] = model.over_noise
        return facts


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
