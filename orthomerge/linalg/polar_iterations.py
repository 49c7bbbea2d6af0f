"""Iterations towards the polar factor: scaled Newton, QDWH, quintic minimax, Newton-Schulz.

All take square matrices [..., n, n] in float32 or float64 and make no promise of their own:
whether the result is the polar factor is measured by ``polar_factors``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["newton", "newton_schulz", "qdwh", "quintic", "quintic_coefficients"]

_STEPS = 30
_SAFETY = 1.01  # rounding may leave the interval; the polynomials grow fast outside it
_CAREFUL = 0.1  # the interval's error above which the safety factor is used


def newton_schulz(X: Tensor) -> Tensor:
    """Take one step ``X (3 I - X^T X) / 2``: a defect d of orthogonality becomes about d^2."""
    return 1.5 * X - 0.5 * (X @ (X.mT @ X))


def newton(M: Tensor) -> Tensor:
    """Iterate ``X <- (g X + X^{-T} / g) / 2`` with g from 1- and infinity-norms.

    References:
        Higham, Functions of Matrices (2008), section 8.6.
    """
    X = M
    scaled = True
    for _ in range(_STEPS):
        inverse, _info = torch.linalg.inv_ex(X)
        g = _balance(inverse, X) if scaled else torch.ones_like(X[..., :1, :1])
        following = (g * X + inverse.mT / g) / 2
        change = _largest_change(following, X)
        X = following
        if not math.isfinite(change) or change < _converged(X):
            break
        scaled = scaled and change > 1e-2
    return newton_schulz(X)


def qdwh(M: Tensor) -> Tensor:
    """Iterate Halley's map with weights that fit the interval [l, 1] of singular values.

    By QR while the weight c exceeds 100, by Cholesky afterwards. l starts at eps, so that a
    nearly singular matrix costs two more steps instead of failing.

    References:
        Nakatsukasa, Bai, Gygi (2010), equations 3.4 to 3.6 and 5.1.
    """
    X = M / _spectral_bound(M)
    lower = torch.finfo(X.dtype).eps
    for _ in range(_STEPS):
        a, b, c = _halley_weights(lower)
        following = _halley_by_qr(X, a, b, c) if c > 100 else _halley_by_cholesky(X, a, b, c)
        lower = min(1.0, lower * (a + b * lower**2) / (1 + c * lower**2))
        change = _largest_change(following, X)
        X = following
        if not math.isfinite(change) or (change < _converged(X) and lower > 0.9):
            break
    return X


def quintic(M: Tensor) -> Tensor:
    """Compose minimax odd quintics ``X (a I + b G + c G^2)``, G = X^T X, then Newton-Schulz.

    Products only. The sequence starts from singular values in [l, 1] with l = 1e-5 in float32
    and 1e-7 in float64; smaller ones get a few more steps of the limiting polynomial.

    References:
        Amsel, Persson, Musco, Gower, The Polar Express, arXiv:2505.16932 (the idea).
    """
    X = M / _spectral_bound(M)
    schedule = quintic_coefficients(1e-5 if X.dtype == torch.float32 else 1e-7)
    limit = (1.875, -1.25, 0.375)
    for step in range(len(schedule) + 12):
        a, b, c = schedule[step] if step < len(schedule) else limit
        G = X.mT @ X
        if step >= len(schedule) and _defect(G) < 1e-3:
            break
        P = b * G + c * (G @ G)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        X = X @ P
    return newton_schulz(newton_schulz(X))


@lru_cache(maxsize=16)
def quintic_coefficients(lower: float) -> tuple[tuple[float, float, float], ...]:
    """Return the minimax quintics (a, b, c) that bring [lower, 1] to 1, first to last.

    Each is best on what the one before it left; the safety factor is already in it.

    Args:
        lower: Least singular value the sequence is made for, in (0, 1).

    >>> a, b, c = quintic_coefficients(0.5)[0]
    >>> abs(a + b + c - 1) < 0.1
    True
    """
    steps: list[tuple[float, float, float]] = []
    low, high = lower, 1.0
    while high - low > 1e-3 and len(steps) < 40:
        (a, b, c), error = _minimax_quintic(low, high)
        s = _SAFETY if error > _CAREFUL else 1.0
        a, b, c = a / s, b / s**3, c / s**5
        steps.append((a, b, c))
        low, high = low * (a + b * low**2 + c * low**4), 1 + error
    return tuple(steps)


def _minimax_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """Return the odd quintic nearest to 1 on [low, high], and its error (exchange algorithm)."""
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    a = b = c = error = 0.0
    for _ in range(60):
        x = torch.tensor([low, *inner, high], dtype=torch.float64)
        table = torch.stack([x, x**3, x**5, signs], dim=1)
        solution = torch.linalg.solve(table, torch.ones(4, dtype=torch.float64))
        previous, (a, b, c, error) = error, solution.tolist()
        # Extrema: a + 3 b x^2 + 5 c x^4 = 0.
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        squares = sorted([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)])
        if squares[0] <= 0:
            break
        inner = [math.sqrt(square) for square in squares]
        if abs(error - previous) <= 1e-14:
            break
    return (a, b, c), abs(error)


def _halley_weights(lower: float) -> tuple[float, float, float]:
    square = lower * lower
    d = (4 * (1 - square) / square**2) ** (1 / 3)
    h = math.sqrt(1 + d)
    a = h + math.sqrt(max(8 - 4 * d + 8 * (2 - square) / (square * h), 0.0)) / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def _halley_by_qr(X: Tensor, a: float, b: float, c: float) -> Tensor:
    n = X.shape[-1]
    eye = torch.eye(n, dtype=X.dtype, device=X.device).expand_as(X)
    Q, _ = torch.linalg.qr(torch.cat([math.sqrt(c) * X, eye], dim=-2))
    product: Tensor = Q[..., :n, :] @ Q[..., n:, :].mT
    return (b / c) * X + ((a - b / c) / math.sqrt(c)) * product


def _halley_by_cholesky(X: Tensor, a: float, b: float, c: float) -> Tensor:
    Z = c * (X.mT @ X)
    Z.diagonal(dim1=-2, dim2=-1).add_(1)
    L, _info = torch.linalg.cholesky_ex(Z)
    return (b / c) * X + (a - b / c) * torch.cholesky_solve(X.mT, L).mT


def _balance(inverse: Tensor, X: Tensor) -> Tensor:
    ratio = _one_times_infinity(inverse) / _one_times_infinity(X)
    balance: Tensor = ratio.pow(0.25)
    return balance


def _one_times_infinity(X: Tensor) -> Tensor:
    size = X.abs()
    one = size.sum(dim=-2).amax(dim=-1)
    infinity = size.sum(dim=-1).amax(dim=-1)
    return (one * infinity)[..., None, None]


def _spectral_bound(M: Tensor) -> Tensor:
    """Return an upper bound of ``||M||_2`` that is never too small: ``||X^T X||_F^(1/2)``."""
    rough = _one_times_infinity(M).sqrt()
    rough = torch.where(rough > 0, rough, 1.0)
    X = M / rough
    fine = torch.linalg.vector_norm(X.mT @ X, dim=(-2, -1), keepdim=True).sqrt()
    bound: Tensor = rough * torch.where(fine > 0, fine, 1.0) * (1 + 1e-5)
    return bound


def _defect(G: Tensor) -> float:
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return float((G - eye).abs().amax()) if G.numel() else 0.0


def _largest_change(X: Tensor, before: Tensor) -> float:
    if X.numel() == 0:
        return 0.0
    change = torch.linalg.vector_norm(X - before, dim=(-2, -1))
    return float((change / math.sqrt(X.shape[-1])).max())


def _converged(X: Tensor) -> float:
    return math.sqrt(torch.finfo(X.dtype).eps) / 10  # quadratic: the step after it is exact
