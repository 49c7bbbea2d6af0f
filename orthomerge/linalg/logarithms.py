"""Exponential, logarithm and angles of rotations, and the way between the log and Cayley charts.

Each is one real symmetric eigendecomposition, in float64 whatever the input; no complex numbers,
no general matrix function. The Cayley map itself is in ``rotations``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import require_finite
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = [
    "cayley_angles",
    "cayley_from_log",
    "exp_so",
    "log_from_cayley",
    "log_so",
    "rotation_angles",
]

_MAX_GRAM_ERROR = 1e-2  # largest |R^T R - I| entry that passes for a rounded rotation


@full_precision()
def exp_so(L: torch.Tensor) -> torch.Tensor:
    """Map skew-symmetric matrices to rotations by the exponential.

    ``exp L = cos(|L|) + sinc(|L|) L`` with ``|L| = (L^T L)^{1/2}``; L, R [..., n, n]. An eigenvalue
    ``i phi`` of L becomes the rotation angle phi. Both functions are entire in ``L^T L``, so small
    angles beside large ones lose nothing.

    Args:
        L: Skew-symmetric matrices. The error is about ``eps max(1, ||L||_2^2)`` in float64.

    Returns:
        Rotations, in float32 or float64.

    Raises:
        NumericalError: The input is not finite.

    >>> L = torch.tensor([[0.0, math.pi / 2], [-math.pi / 2, 0.0]], dtype=torch.float64)
    >>> exp_so(L).round(decimals=12).abs()
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)
    """
    X = require_finite(L, "the logarithm L").double()
    squares, V = torch.linalg.eigh(X.mT @ X)
    phi = squares.clamp(min=0).sqrt()
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    # I is added last: its rounding must not drown the entries of a tiny L.
    versine = (V * (2 * (phi / 2).sin().square())[..., None, :]) @ V.mT
    sinc = (V * torch.sinc(phi / math.pi)[..., None, :]) @ V.mT
    R: torch.Tensor = eye + (_skew_part(sinc @ X) - versine)
    return R.to(working_dtype(L))


@full_precision()
def log_so(R: torch.Tensor) -> torch.Tensor:
    """Map rotations to skew-symmetric matrices, the inverse of ``exp_so`` below the angle pi.

    ``log R = f(sym R) skew(R)`` with ``f(cos phi) = phi / sin phi``; R, L [..., n, n]. Sine and
    cosine both decide phi, so tiny angles keep their relative accuracy.

    Args:
        R: Rotations with all angles below pi.

    Returns:
        Exactly skew-symmetric matrices with ``||L||_2 < pi``, in float32 or float64. A relative
        error e in R, that of its storage included, is one of ``e phi / sin phi`` in L: 21 e at
        3 rad. So ``exp_so(log_so(R))`` gives R back to 1e-6 in float32 and 1e-12 in float64, and
        ``log_so(exp_so(L))`` gives L to about ``20 sqrt(n) eps`` for angles up to 3.

    Raises:
        NumericalError: An angle is within ``2 sqrt(eps)`` of pi (7e-4 rad in float32, 3e-8 in
            float64), where the plane's sense of rotation is noise; or R is a reflection (det -1);
            or R is not orthogonal or not finite.

    References:
        Gallier and Xu, "Computing exponentials of skew-symmetric matrices and logarithms of
        orthogonal matrices" (2002).

    >>> log_so(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([[ 0.0000,  1.5708],
            [-1.5708,  0.0000]])
    """
    L, largest = principal_log(R)
    if bool((largest > math.pi - _noise_angle(R.dtype)).any()):
        raise NumericalError(
            "a rotation has an eigenvalue near -1 (an angle near pi, or a reflection), "
            "where the logarithm is not unique",
            found=f"angle {float(largest.max()):.6g}",
            remedy="Interpolate towards the identity first, or leave this layer unrotated.",
        )
    return L.to(working_dtype(R))


def principal_log(R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logarithms in float64 and the largest angle of each, refusing no angle.

    R [..., n, n] -> L [..., n, n], angles [...]. The largest angle of a reflection is pi; where
    it is near pi, L means nothing.

    Raises:
        NumericalError: R is not orthogonal or not finite.
    """
    X = _orthonormal(R)
    symmetric, skew = (X + X.mT) / 2, _skew_part(X)
    cosines, V = torch.linalg.eigh(symmetric)
    # |K v| is |sin phi| for every v in an eigenspace of the symmetric part.
    sines = torch.linalg.vector_norm(skew @ V, dim=-2)
    phi = torch.atan2(sines, cosines)
    f = (V * torch.where(sines > 0, phi / sines, 1.0)[..., None, :]) @ V.mT
    largest = phi.amax(dim=-1) if phi.shape[-1] else phi.sum(dim=-1)
    reflected = torch.linalg.slogdet(X).sign < 0
    return _skew_part(f @ skew), torch.where(reflected, math.pi, largest)


@full_precision()
def rotation_angles(R: torch.Tensor) -> torch.Tensor:
    """Return the rotation angles of ``R``, one for each plane, largest first.

    R [..., n, n] -> [..., n // 2], in [0, pi], float64. Cosines come from the symmetric part,
    sines as singular values of the skew part, separately for the angles below and above pi/2;
    ``atan2`` of both is accurate for tiny angles and near pi. An odd n has one fixed axis more.

    Args:
        R: Rotations.

    Raises:
        NumericalError: R is a reflection (det -1), whose eigenvalues do not pair; or it is not
            orthogonal or not finite.

    >>> rotation_angles(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([1.5708], dtype=torch.float64)
    """
    X = _orthonormal(R)
    if bool((torch.linalg.slogdet(X).sign < 0).any()):
        raise NumericalError(
            "R is a reflection (determinant -1), so it has no rotation angles in pairs",
            remedy="Flip one singular vector, or raise the anchor of the fit it came from.",
        )
    skew = _skew_part(X)
    cosines, V = torch.linalg.eigh((X + X.mT) / 2)  # ascending, so angles descending
    acute = cosines > 0
    lower = _sines_of(skew @ V, acute)  # descending, behind the 2s of the others
    upper = _sines_of(skew @ V, ~acute).flip(-1)
    phi = torch.atan2(torch.where(acute, lower, upper), cosines)
    return _pair_means(phi)


def _sines_of(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the singular values of the chosen columns, descending; 2 stands for each other."""
    others = torch.diag_embed(torch.where(chosen, 0.0, 2.0).to(images))
    stacked = torch.cat([images * chosen[..., None, :], others], dim=-2)
    values: torch.Tensor = torch.linalg.svdvals(stacked)
    return values


@full_precision()
def cayley_angles(A: torch.Tensor) -> torch.Tensor:
    """Return the rotation angles of ``cayley(A)``, one for each plane, largest first.

    ``phi_k = 2 atan(a_k)`` with a_k the singular values of A, which come in pairs;
    A [..., n, n] -> [..., n // 2], float64.

    Args:
        A: Skew-symmetric matrices.

    Raises:
        NumericalError: The input is not finite.

    >>> cayley_angles(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([1.5708], dtype=torch.float64)
    """
    values = torch.linalg.svdvals(require_finite(A, "the Cayley coordinate A").double())
    return _pair_means(2 * values.atan())


@full_precision()
def log_from_cayley(A: torch.Tensor) -> torch.Tensor:
    """Turn Cayley coordinates into logarithms of the same rotations.

    ``L = 2 atan(A)``, so that ``exp_so(L) = cayley(A)``; A, L [..., n, n].

    Args:
        A: Skew-symmetric matrices. The error is about ``eps ||A||_2^2`` in float64, so this is
            meant for angles up to about pi - 1e-4.

    Returns:
        Exactly skew-symmetric matrices, in float32 or float64.

    Raises:
        NumericalError: The input is not finite.

    >>> log_from_cayley(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([[ 0.0000,  1.5708],
            [-1.5708,  0.0000]])
    """
    return _odd_function(A, lambda a: 2 * a.atan(), slope=2.0, what="the Cayley coordinate A")


@full_precision()
def cayley_from_log(L: torch.Tensor) -> torch.Tensor:
    """Turn logarithms into Cayley coordinates of the same rotations.

    ``A = tan(L / 2)``, so that ``cayley(A) = exp_so(L)``; L, A [..., n, n].

    Args:
        L: Skew-symmetric matrices with all angles below pi.

    Returns:
        Exactly skew-symmetric matrices, in float32 or float64.

    Raises:
        NumericalError: An angle is within ``2 sqrt(eps)`` of pi or beyond it, where the Cayley
            map ends; or the input is not finite.

    >>> cayley_from_log(torch.tensor([[0.0, math.pi / 2], [-math.pi / 2, 0.0]])).round(decimals=5)
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    limit = math.pi - _noise_angle(L.dtype)

    def half_tangent(phi: torch.Tensor) -> torch.Tensor:
        if bool((phi > limit).any()):
            raise NumericalError(
                "an angle is at pi or beyond it, where the Cayley map ends",
                expected=f"at most {limit:.6g}",
                found=f"{float(phi.max()):.6g}",
                remedy="Stay in the log chart, or shrink the logarithm first.",
            )
        return (phi / 2).tan()

    return _odd_function(L, half_tangent, slope=0.5, what="the logarithm L")


def _odd_function(
    X: torch.Tensor, g: Callable[[torch.Tensor], torch.Tensor], slope: float, what: str
) -> torch.Tensor:
    """Return the skew matrix with X's planes and g of its singular values; slope is g'(0)."""
    Y = require_finite(X, what).double()
    _, V = torch.linalg.eigh(Y.mT @ Y)
    values = torch.linalg.vector_norm(Y @ V, dim=-2)  # the roots of the eigenvalues, but accurate
    ratios = torch.where(values > 0, g(values) / values, slope)
    f = (V * ratios[..., None, :]) @ V.mT
    return _skew_part(f @ Y).to(working_dtype(X))


def _orthonormal(R: torch.Tensor) -> torch.Tensor:
    """Return R in float64, its rounding to a shorter dtype undone to first order."""
    X = require_finite(R, "the rotation R").double()
    excess = X.mT @ X - torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    error = float(excess.abs().max()) if X.numel() else 0.0
    if error > _MAX_GRAM_ERROR:
        raise NumericalError(
            "R is not orthogonal, so it has no rotation angles",
            found=f"|R^T R - I| of {error:.3g}",
            remedy="Take its polar factor first.",
        )
    return X - X @ excess / 2


def _skew_part(X: torch.Tensor) -> torch.Tensor:
    return (X - X.mT) / 2


def _pair_means(values: torch.Tensor) -> torch.Tensor:
    """Average neighbours that are equal but for rounding; [..., n] -> [..., n // 2]."""
    paired = values[..., : values.shape[-1] // 2 * 2]
    return (paired[..., ::2] + paired[..., 1::2]) / 2


def _noise_angle(dtype: torch.dtype) -> float:
    """Return the distance from pi below which an angle's sense of rotation is noise."""
    resolved = dtype if dtype == torch.float64 else torch.float32
    return 2 * math.sqrt(torch.finfo(resolved).eps)
