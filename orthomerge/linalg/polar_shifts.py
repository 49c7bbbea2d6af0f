"""The polar factor of a block-triangular matrix by shifted inverses of half its size.

What it is good to is for the caller to measure; polar factors of general matrices are in
``polar_factors``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthomerge.linalg.checks import frobenius
from orthomerge.linalg.polar_iterations import newton_schulz

__all__ = ["inverse_root_shifts", "shifted_polar"]

_CONDITION = 1e6  # its square still leaves float64 four digits
_ERROR = 2e-4  # of the rational function: one Newton-Schulz step squares it
_POWER_STEPS = 8
_LEAF = 256  # rows up to which a Cholesky factorisation is quicker than halving
_MARGIN = 0.8  # power steps do not quite reach the largest singular value


def shifted_polar(C: Tensor, B: Tensor, corner: float, out: torch.dtype) -> Tensor | None:
    """Return the polar factor of ``N = [[C, B], [0, corner I]]``; None where N is too singular.

    ``R = (N N^T)^{-1/2} N`` with ``x^{-1/2} = sum_j w_j / (x + t_j)``, the best sum of its length
    on the spectrum. As the corner is a multiple of I, each term needs one o x o inverse only:
    with ``G = C C^T + t / (corner^2 + t) B B^T + t I`` and ``b = corner / (corner^2 + t)``,
    ``(N N^T + t I)^{-1} = [[G^-1, -b G^-1 B], [-b B^T G^-1, b / corner I + b^2 B^T G^-1 B]]``.
    All terms are positive definite, so R is the polar factor as soon as it is orthogonal.

    Args:
        C: [o, o], float64.
        B: [o, m], float64.
        corner: Positive.
        out: The dtype of the result.

    References:
        Hale, Higham, Trefethen, SIAM J. Numer. Anal. 46 (2008), section 3.
    """
    P, Q, o = C @ C.mT, B @ B.mT, len(C)
    high = math.sqrt(float(frobenius(P))) + corner
    low = _MARGIN * _least_singular_value(C, B, corner)
    if not (low * _CONDITION > high):
        return None
    sums = [torch.zeros_like(P) for _ in range(3)]
    rest = 0.0
    for t, w in inverse_root_shifts(low, high, _count(low / high)):
        b = corner / (corner**2 + t)
        G = torch.add(P, Q, alpha=t / (corner**2 + t))
        G.diagonal().add_(t)
        inverse = _spd_inverse(G)
        for power, total in enumerate(sums):
            total.add_(inverse, alpha=w * b**power)
        rest += w * b
    R = torch.empty(o + B.shape[1], o + B.shape[1], dtype=out, device=C.device)
    R[:o, :o] = sums[0] @ C
    R[:o, o:] = sums[0].sub_(sums[1], alpha=corner) @ B
    R[o:, :o] = -B.mT @ (sums[1] @ C)
    R[o:, o:] = B.mT @ ((corner * sums[2]).sub_(sums[1]) @ B)
    R[o:, o:].diagonal().add_(rest)
    return newton_schulz(R)


def inverse_root_shifts(low: float, high: float, count: int) -> list[tuple[float, float]]:
    """Return (t_j, w_j) with ``1 / s = sum_j w_j / (s^2 + t_j)`` for s in [low, high].

    ``t_j = (low sc u_j)^2``, ``w_j = 2 K' low / (pi count) dn u_j / cn^2 u_j``,
    ``u_j = (j - 1/2) K' / count``, elliptic functions of modulus k', k = low / high. The relative
    error is about ``4 exp(-2 pi^2 count / (2 log(high / low) + 3))``.

    Args:
        low: Least s, positive.
        high: Largest s, above it.
        count: How many terms.

    >>> sum(w / (0.5**2 + t) for t, w in inverse_root_shifts(0.1, 1.0, 8)).__round__(6)
    2.0
    """
    k = low / high
    a, b, ratios = 1.0, k, []
    while a - b > 1e-15 * a:  # the arithmetic-geometric mean, which descends to circular functions
        a, b, c = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        ratios.append(c / a)
    shifts = []
    for j in range(count):
        phi = 2 ** len(ratios) * (j + 0.5) / count * math.pi / 2
        for ratio in reversed(ratios):
            phi = (phi + math.asin(ratio * math.sin(phi))) / 2
        sn, cn = math.sin(phi), math.cos(phi)
        weight = low / (a * count) * math.hypot(cn, k * sn) / cn**2
        shifts.append(((low * sn / cn) ** 2, weight))
    return shifts


def _count(ratio: float) -> int:
    return math.ceil(math.log(4 / _ERROR) * (3 - 2 * math.log(ratio)) / (2 * math.pi**2))


def _least_singular_value(C: Tensor, B: Tensor, corner: float) -> float:
    """Return the least singular value of N, from above, by power steps with its inverse."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(C)
    x, y = C.new_ones(len(C), 1), C.new_ones(B.shape[1], 1)
    size = math.nan
    for _ in range(_POWER_STEPS):
        size = math.hypot(float(frobenius(x)), float(frobenius(y)))
        x = torch.linalg.lu_solve(LU, pivots, x / size, adjoint=True)
        y = (y / size - B.mT @ x) / corner**2
        x = torch.linalg.lu_solve(LU, pivots, x - B @ y)
    return size**-0.5 if size > 0 else math.nan


def _spd_inverse(G: Tensor) -> Tensor:
    """Invert a positive definite matrix by halves, which is mostly products.

    The result is not finite, or not an inverse, where G is not positive definite.
    """
    half = len(G) // 2
    if len(G) <= _LEAF:
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(G)[0])
    head = _spd_inverse(G[:half, :half])
    T = head @ G[:half, half:]
    tail = _spd_inverse(G[half:, half:] - G[half:, :half] @ T)
    across = T @ tail
    inverse = torch.empty_like(G)
    inverse[:half, :half] = torch.addmm(head, across, T.mT)
    inverse[:half, half:], inverse[half:, :half] = -across, -across.mT
    inverse[half:, half:] = tail
    return inverse
