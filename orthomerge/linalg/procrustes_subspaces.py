"""Anchored orthogonal Procrustes of a wide layer, in the span of the rows of both weights.

The rotation is the identity outside that span. When this reduction is taken is decided in
``procrustes_fits``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from orthomerge.linalg.checks import frobenius
from orthomerge.linalg.polar_factors import PolarMethod
from orthomerge.linalg.polar_shifts import shifted_polar
from orthomerge.linalg.procrustes_frames import Factored, ProcrustesBase, dense_fit, measured

__all__ = ["subspace_fit"]

_SHIFTS_FROM = 192  # rows; for smaller cores one eigenproblem is quicker
_DEFECT = 5e-7  # of orthogonality, up to which float32 cores are taken as they are
_INDEPENDENT = {torch.float32: 1e-3, torch.float64: 1e-8}
_FAR = 700.0  # norm of A that no rotation has whose angles stay clear of pi


def subspace_fit(
    base: ProcrustesBase, X: Tensor, anchor: float, method: PolarMethod, data: torch.dtype
) -> Factored:
    """Solve in the span of the rows of W0 and X, of dimension at most 2 o; R = I outside it.

    With ``W0^T = V0 L0`` and the frame ``S = [V0, f]``, ``S^T W0^T X S = [[K, B], [0, 0]]``, as
    the rows of W0 have no part along f.
    """
    V0, L0 = base.rows
    f, change = _completed(V0, (X.double() - base.weight.double()) / base.unit, data)
    o = L0.shape[0]
    K, B = L0 @ (L0.mT + change[:, :o]), L0 @ change[:, o:]
    found = _solved(K, B, anchor, method, data)
    core = found.core
    turn = core[:o].clone()
    turn.diagonal().sub_(1)
    moved = L0.mT.to(core.dtype) @ turn
    half = _half(core, V0.to(core.dtype), f.to(core.dtype)) if anchor else None
    return Factored(
        frame=torch.cat([V0, f], dim=1),
        core=core,
        report=found.report,
        reduction="subspace",
        half=half,
        misfit=moved - change.to(core.dtype),
        moved=moved,
    )


def _completed(V0: Tensor, D: Tensor, data: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return f that makes [V0, f] an orthonormal basis of the rows' span, and D [V0, f]."""
    inside = D @ V0
    rest = D - inside @ V0.mT
    if data == torch.float32:
        L, failed = torch.linalg.cholesky_ex(rest @ rest.mT)
        if not bool(failed) and _independent(L, inside, data):
            f = torch.linalg.solve_triangular(L, rest, upper=False).mT
            return f, torch.cat([inside, L], dim=1)
    f, L = torch.linalg.qr(rest.mT)
    if _independent(L, inside, torch.float64):
        f = f - V0 @ (V0.mT @ f)
        return f, torch.cat([inside, L.mT], dim=1)
    # Where the rest is nearly dependent, f is rounding noise and need not be orthogonal to V0.
    f = torch.linalg.qr(torch.cat([V0, D.mT], dim=1))[0][:, V0.shape[1] :]
    return f, torch.cat([inside, D @ f], dim=1)


def _independent(L: Tensor, inside: Tensor, precision: torch.dtype) -> bool:
    diagonal = L.diagonal().abs()
    largest = torch.maximum(diagonal.amax(), inside.abs().amax())
    return bool(diagonal.amin() > _INDEPENDENT[precision] * largest)


def _solved(
    K: Tensor, B: Tensor, anchor: float, method: PolarMethod, data: torch.dtype
) -> Factored:
    """Return polar([[K, B], [0, 0]] + anchor I), by shifted inverses where that is quicker."""
    o, k = K.shape[0], K.shape[0] + B.shape[1]
    tried = False
    if _shifts_pay(K, anchor, method, data):
        C = K.clone()
        C.diagonal().add_(anchor)
        core = shifted_polar(C, B, anchor, data)
        if core is not None:
            report = measured(core, "shifts")
            if report.residual <= _DEFECT:
                return Factored(None, core, report, "dense")
            tried = True
    M = torch.zeros(k, k, dtype=K.dtype, device=K.device)
    M[:o, :o], M[:o, o:] = K, B
    # The null space is settled in float64; the factor itself is as good as the data.
    found = dense_fit(M, anchor, method, data, out=data if anchor else torch.float64)
    return replace(found, report=replace(found.report, fallbacks=1)) if tried else found


def _shifts_pay(K: Tensor, anchor: float, method: str, data: torch.dtype) -> bool:
    large = len(K) >= _SHIFTS_FROM and K.device.type == "cpu"
    return large and anchor > 0 and method == "auto" and data == torch.float32


def _half(core: Tensor, V0: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return (h, K, V0) with ``A = h K h^T + V0 h^T - h V0^T``; None with an angle near pi.

    The lower right block of a core is symmetric, so that ``(R + I) f`` is a subspace on which
    the form A vanishes, and only inverses of half the size are needed:
    ``h = V0 + f T`` with ``T = -(R22 + I)^{-1} R21``, ``K = I - 2 (R11 + I + R12 T)^{-1}``.
    """
    o, m = V0.shape[1], f.shape[1]
    eye = torch.eye(max(o, m), dtype=core.dtype, device=core.device)
    T, failed = torch.linalg.solve_ex(core[o:, o:] + eye[:m, :m], -core[o:, :o])
    inverse, singular = torch.linalg.inv_ex(core[:o, :o] + eye[:o, :o] + core[:o, o:] @ T)
    K = eye[:o, :o] - 2 * inverse
    size, slope = float(frobenius(K)), float(frobenius(T))
    if bool(failed) or bool(singular) or not (size * (1 + slope**2) + slope < _FAR):
        return None
    return V0 + f @ T, (K - K.mT) / 2, V0
