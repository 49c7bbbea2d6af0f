"""Maps between skew-symmetric matrices and rotations: Cayley, its inverse, PEFT's series.

All are batched over leading axes and compute in float32 or float64; half precision is lifted.
"""

from __future__ import annotations

import math

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import frobenius, require_finite
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["apply_cayley", "cayley", "cayley_neumann", "inverse_cayley"]

_MAX_ASYMMETRY = 1e-2  # relative, per entry; rounding alone stays below a tenth of it


@full_precision()
def cayley(A: torch.Tensor) -> torch.Tensor:
    """Map skew-symmetric matrices to rotations.

    ``R = (I - A)^{-1} (I + A)``; A, R [..., n, n]. An eigenvalue ``i tan(phi/2)`` of A becomes
    the rotation angle phi, so every angle below pi is reached and A = 0 gives the identity.

    Args:
        A: Skew-symmetric matrices. I - A is then always invertible.

    Returns:
        Rotations, in float32 or float64.

    Raises:
        NumericalError: The input or the result is not finite.

    References:
        Cayley (1846); OFT, arXiv:2306.07280, section 3.3, with the opposite sign of Q.

    >>> cayley(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    X = A.to(working_dtype(A))
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    R: torch.Tensor = torch.linalg.solve(eye - X, eye + X)
    return require_finite(R, "the Cayley map of A")


@full_precision()
def apply_cayley(W: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Rotate the columns of a weight by one solve, without forming the rotation.

    ``W Cayley(A) = 2 W (I - A)^{-1} - W``; W [..., o, n], A [n, n] or diagonal blocks
    [nb, b, b] with ``nb b = n``.

    Args:
        W: The weight.
        A: Skew-symmetric, so that I - A is always invertible.

    Returns:
        The rotated weight, in the wider dtype of the two, at least float32.

    Raises:
        NumericalError: The shapes do not fit, or the result is not finite.

    >>> apply_cayley(torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    dtype = working_dtype(W, A)
    W, A = W.to(dtype), A.to(dtype)
    blocks = A if A.dim() == 3 else A[None]
    count, size = blocks.shape[0], blocks.shape[-1]
    if count * size != W.shape[-1]:
        raise NumericalError(
            "the skew matrix does not fill the columns",
            expected=f"{W.shape[-1]} columns",
            found=f"{count} blocks of {size}",
        )
    eye = torch.eye(size, dtype=dtype, device=W.device)
    rows = W.reshape(-1, count, size).transpose(0, 1)
    solved = torch.linalg.solve(eye - blocks, rows, left=False)
    rotated = 2 * solved.transpose(0, 1).reshape(W.shape) - W
    return require_finite(rotated, "the rotated weight")


@full_precision()
def inverse_cayley(R: torch.Tensor) -> torch.Tensor:
    """Map rotations to skew-symmetric matrices, the inverse of ``cayley``.

    ``A = (R + I)^{-1} (R - I)``, skew part; R, A [..., n, n].

    Args:
        R: Rotations without an eigenvalue near -1, i.e. with all angles below pi.

    Returns:
        Exactly skew-symmetric matrices, in float32 or float64.

    Raises:
        NumericalError: An eigenvalue of R is so near -1 that A would be noise (within about
            7e-4 rad of pi in float32, 3e-8 in float64; reflections always are), or R is not
            orthogonal.

    >>> A = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
    >>> torch.allclose(inverse_cayley(cayley(A)), A)
    True
    """
    X = require_finite(R.to(working_dtype(R)), "the rotation R")
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    A, failed = torch.linalg.solve_ex(X + eye, X - eye)
    if bool((failed != 0).any()) or _spectral_bound(A) > 1 / math.sqrt(torch.finfo(A.dtype).eps):
        raise NumericalError(
            "a rotation has an eigenvalue near -1 (an angle near pi), where the Cayley map ends",
            remedy="Interpolate towards the identity first, or leave this layer unrotated.",
        )
    skew: torch.Tensor = (A - A.mT) / 2
    excess = float((A - skew).abs().max()) if A.numel() else 0.0
    if excess > _MAX_ASYMMETRY * max(1.0, float(skew.abs().max())):
        raise NumericalError(
            "R is not orthogonal, so it has no skew-symmetric preimage",
            found=f"asymmetry {excess:.3g}",
            remedy="Take its polar factor first.",
        )
    return skew


@full_precision()
def cayley_neumann(Q: torch.Tensor, terms: int, *, legacy: bool = False) -> torch.Tensor:
    """Evaluate PEFT's truncated Neumann series of the Cayley map.

    With m = max(3, terms - 1), for ``terms >= 3``:
    ``K = (I + Q)(I + Q + ... + Q^{m-1}) = I + 2Q + ... + 2Q^{m-1} + Q^m``,
    so that 3 and 4 terms coincide; 2 terms give I + 2Q, fewer give I. ``legacy`` is the series of
    PEFT 0.16 and 0.17, ``K = I + 2(Q + ... + Q^{terms-1})``. Q, K [..., n, n].

    The limit is ``cayley(Q)``; K is orthogonal only to about ``2 ||Q||_2^m`` (m even) or
    ``||Q||_2^{2m}`` (m odd), and diverges from it when ``||Q||_2 >= 1``.

    Args:
        Q: Skew-symmetric matrices.
        terms: PEFT's ``num_cayley_neumann_terms``.
        legacy: Evaluate the older series.

    Returns:
        The series, in float32 or float64.

    Raises:
        NumericalError: The input or the result is not finite.

    References:
        PEFT >= 0.18, ``tuners/oft/layer.py``, ``OFTRotationModule._cayley_batch``.

    >>> Q = torch.tensor([[0.0, 0.1], [-0.1, 0.0]])
    >>> cayley_neumann(Q, 2)
    tensor([[ 1.0000,  0.2000],
            [-0.2000,  1.0000]])
    """
    X = Q.to(working_dtype(Q))
    K = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device).expand_as(X).clone()
    power = X
    for index, coefficient in enumerate(_coefficients(terms, legacy)):
        power = power @ X if index else X
        K.add_(power, alpha=coefficient)
    return require_finite(K, "the Cayley-Neumann series of Q")


def _coefficients(terms: int, legacy: bool) -> list[float]:
    """Return the coefficients of Q, Q^2, ... in the series."""
    if legacy or terms < 3:
        return [2.0] * (terms - 1)
    return [2.0] * (max(3, terms - 1) - 1) + [1.0]


def _spectral_bound(A: torch.Tensor) -> float:
    """Return a number between the largest ``||A||_2`` of the batch and a cheap bound on it.

    A pair of eigenvalues +-i mu contributes 2 mu^2 to the squared Frobenius norm. Only when that
    bound is too coarse to decide is the spectral norm itself computed.
    """
    if A.numel() == 0:
        return 0.0
    bound = float(frobenius(A).max()) / math.sqrt(2)
    if not math.isfinite(bound):
        return math.inf
    if bound <= 1 / math.sqrt(torch.finfo(A.dtype).eps):
        return bound
    return float(torch.linalg.matrix_norm(A, 2).max())
