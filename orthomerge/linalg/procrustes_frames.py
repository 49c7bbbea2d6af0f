"""Orthogonal Procrustes in its dense form and reduced to matrices of the size of the rows.

Each function solves one problem once; the anchored problem of a wide layer is in
``procrustes_subspaces``. When to take which, and what to do when the answer has an angle near pi,
is decided in ``procrustes_fits``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from orthomerge.linalg.checks import frobenius, require_finite
from orthomerge.linalg.polar_factors import PolarMethod, PolarReport, polar_at_precision
from orthomerge.linalg.polar_iterations import newton_schulz
from orthomerge.linalg.precision import working_dtype

__all__ = ["Factored", "ProcrustesBase", "dense_fit", "measured", "qr_core_fit"]

_RANK = 1e-10  # of a triangular factor's diagonal: below it the rows are taken as dependent
_MODERATE = 100.0  # norm of K up to which no angle can be near pi
_POWER_STEPS = 8
_SINGLE_CONDITION = 2e4
_SINE = 1e-7  # a principal angle below it has no direction of its own


class ProcrustesBase:
    """A base weight with what every fit against it needs, computed once for all experts.

    Args:
        W0: The base weight [o, n].

    >>> ProcrustesBase(torch.eye(2)).norm
    1.4142135623730951
    """

    def __init__(self, W0: Tensor) -> None:
        self.weight = require_finite(W0.to(working_dtype(W0)), "the base weight")
        self.norm = float(frobenius(self.weight))

    @cached_property
    def double(self) -> Tensor:
        """The weight in float64, scaled to norm sqrt(n), so that lambda is the anchor itself."""
        return self.weight.double() / self.unit

    @property
    def unit(self) -> float:
        """What weights are divided by."""
        return self.norm / math.sqrt(self.weight.shape[-1])

    @cached_property
    def gram(self) -> Tensor:
        """``W0^T W0`` of the scaled weight, float64; the part of ``W0^T X`` all experts share."""
        return self.double.mT @ self.double

    def scaled(self, X: Tensor) -> Tensor:
        """Return another weight in float64, scaled as the base is."""
        return X.double() / self.unit

    @cached_property
    def largest(self) -> float:
        """The largest singular value of the scaled weight, by a few power steps."""
        v = self.weight.new_ones(self.weight.shape[1])
        for _ in range(_POWER_STEPS):
            v = self.weight.mT @ (self.weight @ (v / torch.linalg.vector_norm(v)))
        return math.sqrt(float(torch.linalg.vector_norm(v))) / self.unit

    def single_is_enough(self, anchor: float) -> bool:
        """Tell whether ``W0^T X + anchor I`` and its polar factor may be computed in float32.

        A pair of directions turns by an error of ``eps ||N|| / (s_j + s_k)``, and for a
        fine-tune no singular value of N is much below the anchor.
        """
        bounded = 1.5 * self.largest**2 <= _SINGLE_CONDITION * anchor
        return bounded and self.weight.dtype == torch.float32

    def against(self, X: Tensor, precision: torch.dtype) -> Tensor:
        """Return ``W0^T X`` of the scaled weights in float64, X [o, n] as stored.

        The Gram matrix is in float64; the product with the change, which is small for a
        fine-tune, need only be as precise as the data.
        """
        if precision == torch.float64:
            return self.double.mT @ self.scaled(X)
        change = (X.to(precision) - self.weight.to(precision)) / self.unit**2
        return torch.add(self.gram, self.weight.to(precision).mT @ change)

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The thin QR factors of the transposed weight, float64."""
        Q, L = torch.linalg.qr(self.double.mT)
        return Q, L


@dataclass(frozen=True)
class Factored:
    """One solution: ``R = I + S (core - I) S^T``, S = I where ``frame`` is None.

    In float64, except that a dense fit of float32 data is in float32.
    ``half`` holds (h, K, a) with ``A = h K h^T + a h^T - h a^T`` where that is known, and
    ``misfit`` is W0 R - X in an orthonormal basis of the rows' span and ``moved`` is
    W0 (R - I) S, both in units of the base.
    """

    frame: Tensor | None
    core: Tensor
    report: PolarReport
    reduction: str
    half: tuple[Tensor, Tensor, Tensor] | None = None
    misfit: Tensor | None = None
    moved: Tensor | None = None


def dense_fit(
    M: Tensor,
    anchor: float,
    method: PolarMethod,
    data: torch.dtype,
    out: torch.dtype = torch.float64,
) -> Factored:
    """Return polar(M + anchor I), or the minimal completion for anchor 0; M [..., n, n]."""
    if anchor == 0:
        flat = M.reshape(-1, *M.shape[-2:])
        core = torch.stack([_minimal_completion(matrix) for matrix in flat]).reshape(M.shape)
        return Factored(None, core, measured(core, "svd"), "dense")
    N = M.clone()
    N.diagonal(dim1=-2, dim2=-1).add_(anchor)
    core, report = polar_at_precision(N, method, data, out)
    return Factored(None, core, report, "dense")


def qr_core_fit(
    base: ProcrustesBase, target: Tensor, method: PolarMethod, data: torch.dtype
) -> Factored | None:
    """Solve for anchor -> 0 with matrices of size o only; None where W0 or X lacks full rank.

    With ``W0^T = V0 L0``, ``X^T = V1 L1``, ``P = polar(L0 L1^T)``, ``V0^T V1 = Y C Z^T``,
    ``a = V0 Y``, ``b = V1 Z``, ``b - a C = f sin``, ``Q = Y^T P Z``, the frame is S = [a, f] and
    ``core = [[Q C, Q sin], [-sin, C]]``. Eliminating the lower half of core + I leaves I + Q, so
    that with ``K = icay(Q)`` and ``h = (a + b) / (1 + C)``:
    ``A = h K h^T + a h^T - h a^T``, without a division by the sines.
    """
    V0, L0 = base.rows
    V1, L1 = torch.linalg.qr(base.scaled(target).mT)
    if _deficient(L0) or _deficient(L1):
        return None
    P, report = polar_at_precision(L0 @ L1.mT, method, data)
    Y, C, Z = _principal(V0.mT @ V1)
    Q = Y.mT @ P @ Z
    K, misfit = _half_skew(Q), L0.mT @ P - L1.mT
    # What follows only spreads the solution over the n inputs: the data's precision is enough.
    V0, V1, Y, Z, Q, C = (T.to(data) for T in (V0, V1, Y, Z, Q, C))
    a, b = V0 @ Y, V1 @ Z
    rest = b - a * C
    sines = torch.linalg.vector_norm(rest, dim=0)
    kept = sines > _SINE
    f = rest[:, kept] / sines[kept]
    cosines, zero = torch.where(kept, C, 1.0), torch.where(kept, sines, 0.0)
    lower = torch.cat([-torch.diag(zero)[kept], torch.diag(cosines[kept])], dim=1)
    core = torch.cat([torch.cat([Q * cosines, (Q * zero)[:, kept]], dim=1), lower])
    half = None if K is None else ((a + b) / (1 + C), K.to(data), a)
    return Factored(torch.cat([a, f], dim=1), core, report, "qr-core", half, misfit)


def _principal(N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of V0^T V1, by eigh where no angle is near a right one."""
    squares, Z = torch.linalg.eigh(N.mT @ N)
    if float(squares.amin()) > 0.1:
        C = squares.sqrt()
        return newton_schulz((N @ Z) / C), C, Z
    Y, C, Zh = torch.linalg.svd(N)
    return Y, C, Zh.mT


def _half_skew(Q: Tensor) -> Tensor | None:
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    inverse, failed = torch.linalg.inv_ex(Q + eye)
    if bool(failed) or not bool(torch.isfinite(inverse).all()):
        return None
    K = eye - 2 * inverse
    if float(frobenius(K)) > _MODERATE:
        return None
    skew: Tensor = (K - K.mT) / 2
    return skew


def _deficient(L: Tensor) -> bool:
    diagonal = L.diagonal().abs()
    return bool(diagonal.amin() <= _RANK * diagonal.amax())


def _minimal_completion(M: Tensor) -> Tensor:
    """Return the limit of polar(M + anchor I) for anchor -> 0, turned into SO(n) if need be.

    The null space is completed with the largest trace; where the determinant is -1, the left
    vector of the smallest singular value changes sign (Kabsch).
    """
    U, s, Vh = torch.linalg.svd(M)
    tolerance = s[0] * M.shape[-1] * torch.finfo(M.dtype).eps
    rank = int((s > tolerance).sum())
    if rank < M.shape[-1]:
        left, _, right = torch.linalg.svd(U[:, rank:].mT @ Vh[rank:].mT)
        U = torch.cat([U[:, :rank], U[:, rank:] @ left], dim=1)
        Vh = torch.cat([Vh[:rank], right @ Vh[rank:]])
    if float(torch.linalg.slogdet(U @ Vh).sign) < 0:
        U = torch.cat([U[:, :-1], -U[:, -1:]], dim=1)
    return newton_schulz(U @ Vh)


def measured(R: Tensor, method: str) -> PolarReport:
    """Return a report on an R that no other check has seen."""
    gram = R.mT @ R
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return PolarReport(method, float(frobenius(gram).max()) / math.sqrt(R.shape[-1]), 0)
