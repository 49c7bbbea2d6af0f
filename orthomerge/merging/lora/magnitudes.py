"""Column magnitudes of low-rank updates, merged apart from their directions; automatic strength.

``D_i = W_i diag(α_i)`` with α_i the norms of D_i's columns. The updates themselves, and what makes
them orthogonal, are in ``stacks``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orthomerge.linalg.block_diagonals import blocks_times, diagonal_blocks
from orthomerge.linalg.factors import Factors
from orthomerge.linalg.precision import full_precision
from orthomerge.merging.lora.stacks import Stack

__all__ = [
    "Decoupled",
    "Magnitude",
    "automatic_scale",
    "column_magnitudes",
    "decouple",
    "mean_magnitude",
    "reattach",
]

Magnitude = Literal["mean", "median", "geomean", "rms", "max", "sum"]

_ZERO = 1e-8  # of a column, relative to the root mean square of its update's columns
_CANCELLED = 1e-6  # of a merged column, relative to the sum of what was added up


@dataclass(frozen=True, slots=True)
class Decoupled:
    """What takes the magnitudes off the columns, and what puts one magnitude back on.

    Attributes:
        inverse: ``α_i^-p`` [..., N, n]; 0 where a column is zero.
        magnitude: ``ᾱ^p`` [..., n].
        mean: ᾱ itself [..., n].
        size: ``Σ |w_i| α_i α_i^-p`` [..., n]: what the directions can add up to.
    """

    inverse: Tensor
    magnitude: Tensor
    mean: Tensor
    size: Tensor


@full_precision()
def column_magnitudes(stack: Stack) -> Tensor:
    """Return the norm of every column of every update [..., N, n], without forming one.

    ``α_i[j]^2 = a_j^T (B_i^T B_i) a_j`` with a_j column j of A_i, as ``||R_i a_j||^2`` with
    ``R_i^T R_i = B_i^T B_i``, which cannot cancel.
    """
    values, vectors = torch.linalg.eigh(diagonal_blocks(stack.left.gram, stack.ranks))
    # The symmetric root, which keeps the padding of unequal ranks where it is.
    roots = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    T = blocks_times(roots, stack.right.transform, stack.ranks)
    rows = T.to(stack.right.rows.dtype) @ stack.right.rows
    parts = torch.split(rows, list(stack.ranks), -2)
    return torch.stack([torch.linalg.vector_norm(part, dim=-2) for part in parts], dim=-2)


def decouple(
    stack: Stack,
    original: Stack,
    *,
    strength: float = 1.0,
    magnitude: Magnitude = "mean",
    source: Literal["orth", "original"] = "original",
    zero_columns: Literal["exclude", "include"] = "exclude",
    cap: float = 10.0,
) -> Decoupled:
    """Split updates into directions and magnitudes, and merge the magnitudes.

    ``W_i = D_i diag(α_i^-p)``, and ᾱ from the α_i; a column is amplified at most κ-fold over what
    it was before the updates were made orthogonal: ``α_i >= α_i(original) / κ``.

    Args:
        stack: The updates whose directions are wanted.
        original: The updates before they were made orthogonal.
        strength: p; 0 leaves the magnitudes on.
        magnitude: How the α_i become ᾱ.
        source: Whose magnitudes are merged.
        zero_columns: Whether columns of zeros count in ᾱ.
        cap: κ.
    """
    own = column_magnitudes(stack)
    before = own if original is stack else column_magnitudes(original)
    merged = before if source == "original" else own
    rms = merged.square().mean(-1, keepdim=True).sqrt()
    present = merged > _ZERO * rms
    counted = present if zero_columns == "exclude" else (stack.weights != 0)[..., None]
    weights = stack.weights.abs().to(own)[..., None] * counted
    mean = mean_magnitude(merged, weights, magnitude)
    divisor = torch.maximum(own, before / cap)
    usable = present & (divisor > 0)
    inverse = torch.where(usable, divisor, 1.0) ** -strength * usable
    size = (stack.weights.abs().to(own)[..., None] * own * inverse).sum(-2)
    return Decoupled(inverse, mean**strength, mean, size)


def mean_magnitude(alpha: Tensor, weights: Tensor, how: Magnitude) -> Tensor:
    """Return one magnitude per column from every adapter's.

    Args:
        alpha: α_i [..., N, n].
        weights: |w_i|, or 0 where an adapter does not count; broadcasts against alpha.
        how: The weighted mean, median, geometric or quadratic mean, the largest, or the sum.

    >>> mean_magnitude(torch.tensor([[1.0], [3.0]]), torch.ones(2, 1), "mean")
    tensor([2.])
    """
    weights = weights.expand_as(alpha)
    total = weights.sum(-2)
    share = weights / torch.where(total > 0, total, 1.0)[..., None, :]
    if how == "mean":
        return (share * alpha).sum(-2)
    if how == "sum":
        return (weights * alpha).sum(-2)
    if how == "rms":
        return (share * alpha.square()).sum(-2).sqrt()
    if how == "max":
        return torch.where(weights > 0, alpha, 0.0).amax(-2)
    if how == "geomean":
        logs = torch.where(share > 0, share * alpha.log(), 0.0).sum(-2)
        return logs.exp() * (total > 0)
    return _median(alpha, share) * (total > 0)


@full_precision()
def reattach(merged: Factors, decoupled: Decoupled, *, renormalise: bool = False) -> Factors:
    """Put the merged magnitude on the columns of merged directions.

    Args:
        merged: The merged directions.
        decoupled: The magnitudes.
        renormalise: Give each column exactly the norm ᾱ, whatever the directions' sum has; one
            that has cancelled becomes 0.
    """
    if not renormalise:
        return Factors(merged.B, merged.A * decoupled.magnitude[..., None, :].to(merged.A))
    norms = merged.column_norms()
    stands = norms > _CANCELLED * decoupled.size.to(norms)
    factor = decoupled.mean.to(norms) / torch.where(stands, norms, 1.0) * stands
    return Factors(merged.B, merged.A * factor[..., None, :])


def automatic_scale(norms: Tensor, weights: Tensor, merged: Tensor) -> Tensor:
    """Return the λ that gives the merged update the mean size of the updates.

    ``T = Σ|w_i| ||D_i|| / Σ|w_i|``, ``λ = T / ||τ||`` within [1/N, 2], N the updates that are not
    zero: 1/N for N equal ones, 1/√N for orthogonal ones of one size, 1 for a single one. Where τ
    is 0, it is 1.

    Args:
        norms: ``||D_i||`` [..., N].
        weights: w_i [..., N].
        merged: ``||τ||`` at λ = 1 [...].
    """
    w = weights.abs()
    target = (w * norms).sum(-1) / torch.where(w.sum(-1) > 0, w.sum(-1), 1.0)
    count = (w > 0).sum(-1).clamp(min=1).to(w)
    scale = target / torch.where(merged > 0, merged, 1.0)
    scale = torch.minimum(torch.maximum(scale, 1.0 / count), torch.full_like(scale, 2.0))
    return torch.where(merged > 0, scale, 1.0)


def _median(alpha: Tensor, share: Tensor) -> Tensor:
    """Return the weighted median; between two candidates, their mean."""
    order = alpha.argsort(-2)
    values, reached = alpha.gather(-2, order), share.gather(-2, order).cumsum(-2)
    lower = (reached >= 0.5 - 1e-6).int().argmax(-2, keepdim=True)
    upper = (reached > 0.5 + 1e-6).int().argmax(-2, keepdim=True)
    return (values.gather(-2, lower) + values.gather(-2, upper))[..., 0, :] / 2
