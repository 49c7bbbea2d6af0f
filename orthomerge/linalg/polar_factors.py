"""The polar factor of a matrix: the nearest orthogonal one, checked, with a safe way out.

Which iteration runs is decided here; the iterations themselves are in ``polar_iterations``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from orthomerge.errors import UnknownNameError
from orthomerge.linalg.checks import require_finite
from orthomerge.linalg.polar_iterations import newton, newton_schulz, qdwh, quintic
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["PolarMethod", "PolarReport", "polar_factor"]

PolarMethod = Literal["auto", "svd", "eigh", "newton", "qdwh", "quintic"]

#: Largest condition for which the squared one of M^T M still leaves the dtype's own accuracy.
_EIGH_CONDITION = {torch.float32: 1e7, torch.float64: 1e4}


@dataclass(frozen=True, slots=True)
class PolarReport:
    """How a polar factor was found.

    Attributes:
        method: The method that was run first.
        residual: ``max ||R^T R - I||_F / sqrt(n)`` of the result.
        fallbacks: How many matrices of the batch were done again, in float64.
    """

    method: str
    residual: float
    fallbacks: int


@full_precision()
def polar_factor(M: Tensor, method: PolarMethod = "auto") -> tuple[Tensor, PolarReport]:
    """Return the orthogonal matrix nearest to ``M`` in the Frobenius norm.

    ``M = U S V^T  ->  R = U V^T``; M, R [..., m, n]. With m > n the columns of R are
    orthonormal, with m < n its rows; rectangular matrices always go through the SVD.

    Args:
        M: Any real matrices. Where M is singular R is not unique: one of the nearest is returned.
        method: ``auto`` takes ``eigh`` on a CPU, where it is the fastest accurate one, and
            ``quintic`` elsewhere. Every result is checked to be orthogonal and to leave
            ``R^T M`` symmetric; what fails is computed again in float64.

    Returns:
        R in float32 or float64, and how it was found.

    Raises:
        NumericalError: M is not finite.
        UnknownNameError: There is no such method.

    References:
        Higham, Functions of Matrices (2008), chapter 8.

    >>> R, report = polar_factor(torch.tensor([[0.0, 2.0], [-3.0, 0.0]]))
    >>> R.round().tolist(), report.fallbacks
    ([[0.0, 1.0], [-1.0, 0.0]], 0)
    """
    if method not in get_args(PolarMethod):
        raise UnknownNameError("polar method", method, get_args(PolarMethod))
    X = require_finite(M.to(working_dtype(M)), "the matrix M")
    if X.shape[-2] < X.shape[-1]:
        R, report = polar_factor(X.mT, method)
        return R.mT, report
    return polar_at_precision(X, method, X.dtype)


def polar_at_precision(
    X: Tensor, method: PolarMethod, precision: torch.dtype, out: torch.dtype | None = None
) -> tuple[Tensor, PolarReport]:
    """Run ``method`` on a tall or square X whose data are only good to ``precision``.

    The result is in ``out`` (X's own dtype by default) and is checked to ``precision``.
    """
    out = out or X.dtype
    if X.numel() == 0:
        return X.clone(), PolarReport("svd", 0.0, 0)
    chosen = _choose(X, method)
    shape = X.shape
    flat = _unit_size(X).reshape(-1, *shape[-2:])
    rounded = flat.to(out)
    R = _by_eigh(flat, precision, out) if chosen == "eigh" else _METHODS[chosen](rounded)
    gram_defects = _defects(R)
    failed = ~_is_polar(R, rounded, precision, gram_defects, symmetric=chosen == "svd")
    count = int(failed.sum())
    if count:
        R[failed] = _safe(flat[failed].double()).to(R.dtype)
        gram_defects = _defects(R)
    residual = float(gram_defects.max())
    return R.reshape(shape), PolarReport(chosen, residual, count)


def _choose(X: Tensor, method: PolarMethod) -> str:
    if X.shape[-2] != X.shape[-1]:
        return "svd"
    if method != "auto":
        return method
    return "eigh" if X.device.type == "cpu" else "quintic"


def _by_svd(X: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return newton_schulz(U @ Vh)


def _by_eigh(X: Tensor, precision: torch.dtype, out: torch.dtype) -> Tensor:
    """Evaluate ``M (M^T M)^{-1/2}`` in float64; NaN where the condition does not allow it."""
    D = X.double()
    values, V = torch.linalg.eigh(D.mT @ D)
    largest = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    allowed = values[..., :1] * _EIGH_CONDITION[precision] ** 2 > largest
    scale = torch.where(allowed, values.clamp_min(1e-300).rsqrt(), torch.nan)
    # D V scale has orthonormal columns, so the last product need not be more precise than R.
    R = newton_schulz((D @ V * scale[..., None, :]).to(out) @ V.mT.to(out))
    # The products of a poorly conditioned M leave a defect that one step may not remove.
    if float(largest.max() / values[..., :1].clamp_min(1e-300).min()) > 1e8:
        R = newton_schulz(R)
    return R


_METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "svd": _by_svd,
    "newton": newton,
    "qdwh": qdwh,
    "quintic": quintic,
}


def _safe(X: Tensor) -> Tensor:
    """Return the polar factor in float64: by Newton off the CPU, by SVD where that fails."""
    if X.device.type == "cpu":
        return _by_svd(X)
    R = newton(X) if X.shape[-2] == X.shape[-1] else torch.full_like(X, torch.nan)
    failed = ~_is_polar(R, X, X.dtype, _defects(R))
    if bool(failed.any()):
        R[failed] = _by_svd(X[failed])
    return R


def _is_polar(
    R: Tensor, X: Tensor, precision: torch.dtype, defects: Tensor, *, symmetric: bool = False
) -> Tensor:
    """Tell per matrix whether R is orthogonal and ``R^T X`` symmetric, to ``precision``.

    ``symmetric`` takes the second for granted, as an SVD allows.
    """
    eps = torch.finfo(precision).eps
    n = R.shape[-1]
    if symmetric:
        return defects <= max(8.0, math.sqrt(n) / 4) * eps
    H = R.mT @ X
    asymmetry = torch.linalg.vector_norm(H - H.mT, dim=(-2, -1))
    size = torch.linalg.vector_norm(X, dim=(-2, -1))
    orthogonal = defects <= max(8.0, math.sqrt(n) / 4) * eps
    polar: Tensor = orthogonal & (asymmetry <= 100 * math.sqrt(n) * eps * size)
    return polar


def _defects(R: Tensor) -> Tensor:
    gram = R.mT @ R
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    norms: Tensor = torch.linalg.vector_norm(gram, dim=(-2, -1)) / math.sqrt(R.shape[-1])
    return norms


def _unit_size(X: Tensor) -> Tensor:
    """Scale each matrix to largest entry 1, so that squares neither over- nor underflow."""
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    return X / torch.where(largest > 0, largest, 1.0)
