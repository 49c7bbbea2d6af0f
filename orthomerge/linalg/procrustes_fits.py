"""The rotation that brings a base weight nearest to another one, anchored at the identity.

The linear algebra of each form of the problem is in ``procrustes_frames``; here a form is chosen,
its answer is checked, and the anchor is raised where an angle comes near pi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from orthomerge.errors import NumericalError, UnknownNameError
from orthomerge.linalg.blocks import rotate_columns
from orthomerge.linalg.checks import frobenius, require_finite
from orthomerge.linalg.polar_factors import PolarMethod, PolarReport
from orthomerge.linalg.precision import full_precision, working_dtype
from orthomerge.linalg.procrustes_anchors import automatic_anchor
from orthomerge.linalg.procrustes_frames import (
    Factored,
    ProcrustesBase,
    dense_fit,
    qr_core_fit,
)
from orthomerge.linalg.procrustes_subspaces import subspace_fit
from orthomerge.linalg.rotations import inverse_cayley

__all__ = [
    "ProcrustesFit",
    "Reduction",
    "procrustes_right",
]

Reduction = Literal["auto", "none", "qr-core", "subspace"]

_TIES_ONLY = 1e-6  # an anchor up to here only breaks ties: its limit 0 stands for it
_NEAR_PI = 1e-6  # least 1 + cos(angle) that the Cayley map is trusted with
_RAISES = 8
_LEAST_PIVOT = 0.1
_MODERATE_SKEW = 3.0  # row sum of |A|, a bound of ||A||_2, up to which squaring costs no digits


@dataclass(frozen=True)
class ProcrustesFit:
    """A fitted rotation, held on the subspace where it is not the identity.

    ``R = I + S (core - I) S^T``; R is never formed unless asked for.

    Attributes:
        frame: S [n, k] with orthonormal columns; None where R is dense or block-diagonal.
        core: The rotation on the frame [k, k], R itself [n, n], or its blocks [nb, b, b].
        anchor: The relative anchor that was finally used.
        retries: How often the anchor was raised.
        residual: ``||W0 R - X||_F``.
        report: How the polar factor was found.
        reduction: "identity", "dense", "qr-core", "subspace" or "block".
        skew: A on the frame where it is known already.
        rotated: W0 R, where it came with the residual.
        half: (h, K, a) with ``A = h K h^T + a h^T - h a^T`` where that is known.
    """

    frame: Tensor | None
    core: Tensor
    anchor: float
    retries: int
    residual: float
    report: PolarReport
    reduction: str
    skew: Tensor | None = None
    half: tuple[Tensor, Tensor, Tensor] | None = None
    rotated: Tensor | None = None

    @full_precision()
    def rotation(self) -> Tensor:
        """Return R, dense [n, n]."""
        if self.core.dim() == 3:
            blocks: Tensor = torch.block_diag(*self.core)  # type: ignore[no-untyped-call]
            return blocks
        return self.core if self.frame is None else self._widen(self._turn(), identity=True)

    @full_precision()
    def generator(self, chart: Literal["cayley", "log"] = "cayley") -> Tensor:
        """Return the skew matrix A of R, dense [n, n], or blocks [nb, b, b] of a block fit.

        Raises:
            NumericalError: R has an angle at pi (only without ``special``, or in the
                reference's own form).
        """
        if chart not in ("cayley", "log"):
            raise UnknownNameError("chart", chart, ("cayley", "log"))
        if chart == "log":
            from orthomerge.linalg.logarithms import log_so

            A: Tensor = log_so(self.core) if self.core.numel() else self.core
        elif self.half is not None:
            h, K, a = self.half
            B = (h @ (K / 2) + a) @ h.mT
            return B - B.mT
        else:
            A = inverse_cayley(self.core) if self.skew is None else self.skew
        return A if self.frame is None else self._widen(A, identity=False)

    @full_precision()
    def apply(self, W: Tensor) -> Tensor:
        """Return ``W R = W + (W S)(core - I) S^T``; W [..., o, n]."""
        dtype = working_dtype(W, self.core)
        W = W.to(dtype)
        if self.core.dim() == 3:
            return rotate_columns(W, self.core)
        if self.frame is None:
            return W @ self.core.to(dtype)
        S = self.frame.to(dtype)
        if not S.shape[1]:
            return W.clone()
        return W + (W @ S) @ self._turn().to(dtype) @ S.mT

    def _turn(self) -> Tensor:
        core = self.core
        return core - torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)

    def _widen(self, small: Tensor, *, identity: bool) -> Tensor:
        S = self.core if self.frame is None else self.frame
        out = S @ small @ S.mT
        if identity:
            out.diagonal().add_(1)
            return out
        return (out - out.mT) / 2


@full_precision()
def procrustes_right(
    W0: Tensor | ProcrustesBase,
    X: Tensor,
    *,
    anchor: float = 1e-6,
    method: PolarMethod = "auto",
    reduce: Reduction = "auto",
    block: int | None = None,
    null: Literal["identity", "svd"] = "identity",
    special: bool = True,
) -> ProcrustesFit:
    """Fit a rotation of the input side: ``W0 R`` nearest to ``X``, R near the identity.

    ``argmin_R ||W0 R - X||_F^2 + lambda ||R - I||_F^2 = polar(W0^T X + lambda I)``,
    ``lambda = anchor ||W0||_F^2 / n``; W0, X [o, n], R in SO(n).

    Without the anchor, o < n leaves an (n - o)-dimensional block of R arbitrary. With any
    anchor R is unique, and the identity where X = W0. If ``sym(W0^T X) + lambda I`` is positive
    definite, every angle is below 90 degrees; short of that, an angle near pi or a reflection
    raises the anchor tenfold until it is gone.

    Args:
        W0: The base weight, or a ``ProcrustesBase`` that several experts share.
        X: The weight to reach.
        anchor: Relative anchor, >= 0. 1e-6 only breaks ties; 1e-3 to 1e-2 also keeps
            ill-conditioned layers from turning far. 0 is the limit from above.
        method: Polar method.
        reduce: ``auto`` solves on the rows' span where that is smaller. ``qr-core`` takes the
            limit anchor -> 0, so it is chosen only for anchors up to 1e-6.
        block: Restrict R to diagonal blocks of this size, which divides n.
        null: ``svd`` with anchor 0 gives ``U V^T`` of a plain SVD in the working dtype, whatever
            its null space and determinant: what the published code does.
        special: Insist on determinant +1 and angles below pi.

    Returns:
        The fit.

    Raises:
        NumericalError: An input is not finite, shapes differ, the anchor is negative, or the
            block size does not divide n.

    References:
        Schoenemann (1966); Kabsch (1976); OrthoMerge, arXiv:2602.05943.

    >>> W0 = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> fit = procrustes_right(W0, torch.tensor([[0.0, 1.0], [-2.0, 0.0]]))
    >>> fit.rotation().round().tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    base = W0 if isinstance(W0, ProcrustesBase) else ProcrustesBase(W0)
    weight = base.weight
    X = require_finite(X.to(working_dtype(X)), "the target weight")
    _check(weight, X, anchor, block, reduce, null)
    if base.norm == 0 or torch.equal(weight, X):
        return _identity(weight, X, anchor, block)
    dtype = working_dtype(weight, X)
    if anchor == 0 and null == "svd":
        return _reference(weight.to(dtype), X.to(dtype))
    options = _Options(method, reduce, block, special)
    return _anchored_fit(base, X, anchor, options, dtype)


@dataclass(frozen=True, slots=True)
class _Options:
    method: PolarMethod
    reduce: Reduction
    block: int | None
    special: bool


def _anchored_fit(
    base: ProcrustesBase, X: Tensor, anchor: float, options: _Options, dtype: torch.dtype
) -> ProcrustesFit:
    retries = 0
    while True:
        found = _solve(base, X, anchor, options, dtype)
        skew, safe = _checked_skew(found)
        if safe or not options.special:
            return _finish(base, X, found, skew if safe else None, anchor, retries, dtype)
        retries += 1
        anchor = _raised(base, X, anchor, retries)
        if options.reduce != "none":  # the QR-core has no anchor that could be raised
            options = replace(options, reduce="subspace")


def _check(W0: Tensor, X: Tensor, anchor: float, block: int | None, reduce: str, null: str) -> None:
    if W0.dim() != 2 or W0.shape != X.shape:
        raise NumericalError(
            "the weights of a Procrustes fit must be two matrices of one shape",
            expected=tuple(W0.shape),
            found=tuple(X.shape),
        )
    if not (anchor >= 0 and math.isfinite(anchor)):
        raise NumericalError("the anchor must be finite and not negative", found=anchor)
    if block is not None and (block < 1 or W0.shape[1] % block):
        raise NumericalError(
            "the block size does not divide the columns",
            expected=f"a divisor of {W0.shape[1]}",
            found=block,
        )
    if reduce not in get_args(Reduction):
        raise UnknownNameError("reduction", reduce, get_args(Reduction))
    if null not in ("identity", "svd"):
        raise UnknownNameError("null space", null, ("identity", "svd"))


def _solve(
    base: ProcrustesBase,
    X: Tensor,
    anchor: float,
    options: _Options,
    data: torch.dtype,
) -> Factored:
    o, n = X.shape
    method, reduce, block = options.method, options.reduce, options.block
    if block is not None:
        pair = base.double, base.scaled(X)
        left, right = (T.reshape(o, -1, block).transpose(0, 1) for T in pair)
        return replace(dense_fit(left.mT @ right, anchor, method, data), reduction="block")
    tiny = anchor <= _TIES_ONLY
    if reduce in ("auto", "qr-core") and n >= 2 * o and tiny:
        found = qr_core_fit(base, X, method, data)
        if found is not None:
            return found
    if n > 2 * o and reduce != "none":
        return subspace_fit(base, X, anchor, method, data)
    cpu = base.weight.device.type == "cpu"
    if o >= n and method == "auto" and cpu and base.single_is_enough(anchor):
        M = (base.weight / base.unit**2).mT @ X.to(base.weight.dtype)
        return dense_fit(M, anchor, "svd", data, out=data)
    # Without a null space a factor in the data's own precision is as good as the data.
    precision = data if o >= n else torch.float64
    return dense_fit(base.against(X, precision), anchor, method, data, out=precision)


def _checked_skew(found: Factored) -> tuple[Tensor | None, bool]:
    """Return A on the frame, and whether all angles stay clear of pi (then det R = +1).

    A's largest eigenvalue is tan(angle / 2); only when its norm cannot exclude an angle near pi
    are the cosines computed.
    """
    core = found.core
    eye = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    half = found.half
    if half is not None:
        return None, True  # then K is moderate, and ||A||_2 <= 2 ||K||_2 + 1
    quick = _skew_by_cholesky(core)
    if quick is not None:
        return quick, True
    inverse, failed = torch.linalg.inv_ex(core + eye)
    if bool((failed != 0).any()) or not bool(torch.isfinite(inverse).all()):
        return None, False
    raw = eye - 2 * inverse
    A = (raw - raw.mT) / 2
    # An eigenvalue -1 itself may sit in the symmetric part, so the norm is that of both.
    if float(frobenius(raw).max()) / math.sqrt(2) < math.sqrt(2 / _NEAR_PI - 1) / 2:
        return A, True
    cosines = torch.linalg.eigvalsh((core + core.mT).double() / 2)
    return A, float(cosines.amin()) + 1 >= _NEAR_PI


def _skew_by_cholesky(core: Tensor) -> Tensor | None:
    """Return ``A = (2 I + R + R^T)^{-1} (R - R^T)``, or None where an angle is not moderate.

    ``2 I + R + R^T = (I + R)^T (I + R)`` is positive definite and has the square of its condition,
    ``1 + ||A||_2^2``, which is why larger angles go another way.
    """
    S = core + core.mT
    S.diagonal(dim1=-2, dim2=-1).add_(2)
    L, failed = torch.linalg.cholesky_ex(S)
    pivots = L.diagonal(dim1=-2, dim2=-1)
    if bool((failed != 0).any()) or (pivots.numel() and float(pivots.amin()) < _LEAST_PIVOT):
        return None  # an eigenvalue at or near -1
    raw = torch.cholesky_solve(core - core.mT, L)
    A = (raw - raw.mT) / 2
    if not A.numel() or float(raw.abs().sum(dim=-1).amax()) < _MODERATE_SKEW:
        return A
    return None


def _raised(base: ProcrustesBase, X: Tensor, anchor: float, retries: int) -> float:
    if retries <= _RAISES:
        return max(1e-6, 10 * anchor)
    return max(10 * anchor, automatic_anchor(base.weight, X - base.weight))


def _finish(
    base: ProcrustesBase,
    X: Tensor,
    found: Factored,
    skew: Tensor | None,
    anchor: float,
    retries: int,
    dtype: torch.dtype,
) -> ProcrustesFit:
    half = found.half
    fit = ProcrustesFit(
        frame=None if found.frame is None else found.frame.to(dtype),
        core=require_finite(found.core.to(dtype), "the fitted rotation"),
        anchor=anchor,
        retries=retries,
        residual=0.0,
        report=found.report,
        reduction=found.reduction,
        skew=None if skew is None else skew.to(dtype),
        half=None if half is None else (half[0].to(dtype), half[1].to(dtype), half[2].to(dtype)),
    )
    if found.misfit is not None:
        if found.moved is not None and fit.frame is not None:
            step = (found.moved.to(dtype) @ fit.frame.mT) * base.unit
            fit = replace(fit, rotated=base.weight + step)
        return replace(fit, residual=float(frobenius(found.misfit)) * base.unit)
    rotated = fit.apply(base.weight)
    return replace(fit, residual=float(frobenius(rotated - X)), rotated=rotated)


def _identity(W0: Tensor, X: Tensor, anchor: float, block: int | None) -> ProcrustesFit:
    n = W0.shape[1]
    frame = None if block is not None else W0.new_zeros(n, 0)
    core = W0.new_zeros(0, 0)
    if block is not None:
        core = torch.eye(block, dtype=W0.dtype, device=W0.device).repeat(n // block, 1, 1)
    skew = torch.zeros_like(core)
    residual = float(frobenius(W0 - X))
    report = PolarReport("none", 0.0, 0)
    return ProcrustesFit(frame, core, anchor, 0, residual, report, "identity", skew)


def _reference(W0: Tensor, X: Tensor) -> ProcrustesFit:
    """Do what the published code does; its solve near an angle of pi is not guarded either."""
    U, _, Vh = torch.linalg.svd(W0.mT @ X)
    R = U @ Vh
    rotated = W0 @ R
    gram = R.mT @ R - torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    report = PolarReport("svd", float(frobenius(gram)) / math.sqrt(max(R.shape[0], 1)), 0)
    residual = float(frobenius(rotated - X))
    eye = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    A, _ = torch.linalg.solve_ex(R + eye, R - eye)
    skew = require_finite((A - A.mT) / 2, "the unguarded inverse Cayley map")
    return ProcrustesFit(None, R, 0.0, 0, residual, report, "dense", skew, rotated=rotated)
