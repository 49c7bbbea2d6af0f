"""Explain one weight's update by a block rotation, a low-rank matrix, or both, and measure how well.

Tensors in, tensors out; reading and writing are in ``run`` and ``folders``.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from orthomerge.extraction.plan import Layer
from orthomerge.extraction.settings import ExtractSettings
from orthomerge.linalg import (
    cayley,
    cayley_angles,
    full_precision,
    procrustes_right,
    residual_noise_baseline,
    rotate_columns,
    truncated_svd,
)

__all__ = ["LayerFactors", "LayerReport", "explain"]

# Directions below this many rounding errors of the weights are left out of the low-rank part.
_ROUNDING_ERRORS = 2


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How much of one layer's update ``D = W1 - W0`` each part explains.

    Shares are of ``||D||_F^2``; ``rotation_share + low_rank_share + residual**2 = 1``.

    Attributes:
        name: Tensor name.
        shape: As stored.
        change: ``||D|| / ||W0||``; inf where W0 is zero.
        rotation_share: ``1 - ||W1 - W0 R||^2 / ||D||^2``; 0 without a rotation.
        rotation_by_chance: What a rotation of these blocks explains of isotropic noise.
        low_rank_share: What B A explains beyond it.
        residual: ``||W1 - W0 R - B A|| / ||D||``.
        rank: Of B A; 0 where none was needed.
        block_size: Of R; 0 without a rotation.
        largest_angle: Largest rotation angle, in degrees.
        anchor: The anchor that the fit ended with.
        change_norm: ``||D||_F``.
        base_norm: ``||W0||_F``.
    """

    name: str
    shape: tuple[int, ...]
    change: float
    rotation_share: float
    rotation_by_chance: float
    low_rank_share: float
    residual: float
    rank: int
    block_size: int
    largest_angle: float
    anchor: float
    change_norm: float
    base_norm: float

    @property
    def explained(self) -> float:
        """The share that both parts explain together."""
        return self.rotation_share + self.low_rank_share


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """What is stored of a layer.

    Attributes:
        generator: Canonical skew blocks A [n/b, b, b], as rounded for storage; R = Cayley(A).
        B: Left factor [o, r].
        A: Right factor [r, n].
    """

    generator: Tensor | None
    B: Tensor | None
    A: Tensor | None


@full_precision()
def explain(
    layer: Layer, W0: Tensor, W1: Tensor, settings: ExtractSettings
) -> tuple[LayerFactors, LayerReport]:
    """Fit ``W1 ≈ W0 R + B A``: first R, then B A to what R leaves.

    Args:
        layer: Which weight.
        W0: The base's [o, n], in float32 or float64.
        W1: The fine-tune's.
        settings: Which parts, and how large.

    Raises:
        NumericalError: A weight is not finite.
    """
    change, base = _norm(W1 - W0), _norm(W0)
    generator, angle, anchor = None, 0.0, 0.0
    turned = W0
    if settings.rotates:
        fit = procrustes_right(W0, W1, anchor=settings.anchor, block=layer.block_size)
        generator, anchor = fit.generator().float(), fit.anchor
        # From here on with the rotation as stored, so that what follows makes up for its rounding.
        turned = rotate_columns(W0, cayley(generator.double()).to(W0.dtype))
        angles = cayley_angles(generator.double())
        angle = math.degrees(float(angles.abs().max())) if angles.numel() else 0.0
    rest = W1 - turned
    after_rotation = _norm(rest)
    B, A, left, rank = None, None, after_rotation, 0
    if settings.low_rank:
        floor = _rounding_floor(W0)
        seed = zlib.crc32(layer.name.encode())
        found = truncated_svd(rest, settings.rank, energy=settings.energy, floor=floor, seed=seed)
        rank = found.rank
        if rank:
            B, A = found.B.float(), found.A.float()
            left = _norm(rest - (B @ A).to(rest.dtype))
    by_chance = (
        residual_noise_baseline(layer.rows, layer.block_size) if generator is not None else 1
    )
    report = LayerReport(
        name=layer.name,
        shape=(layer.columns, layer.rows) if layer.transposed else (layer.rows, layer.columns),
        change=change / base if base else math.inf,
        rotation_share=1 - (after_rotation / change) ** 2,
        rotation_by_chance=1 - by_chance**2,
        low_rank_share=(after_rotation**2 - left**2) / change**2,
        residual=left / change,
        rank=rank,
        block_size=layer.block_size,
        largest_angle=angle,
        anchor=anchor,
        change_norm=change,
        base_norm=base,
    )
    return LayerFactors(generator, B, A), report


def _rounding_floor(W: Tensor) -> float:
    """Return the spectral norm, about, of a few rounding errors in every entry."""
    o, n = W.shape
    rms = _norm(W) / math.sqrt(o * n)
    return _ROUNDING_ERRORS * torch.finfo(W.dtype).eps * rms * (math.sqrt(o) + math.sqrt(n))


def _norm(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X, dtype=torch.float64))
