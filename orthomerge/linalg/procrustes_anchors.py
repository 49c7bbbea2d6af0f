"""How strong an anchor has to be, and what a rotation fit leaves of mere noise.

Numbers about a fit; the fit itself is in ``procrustes_fits``.
"""

from __future__ import annotations

import math

from torch import Tensor

from orthomerge.linalg.checks import frobenius

__all__ = ["automatic_anchor", "residual_noise_baseline", "rotational_limit"]

_DEVIATIONS = 3.0
_PURE = 0.05  # of noise: so near to an exact rotation that the layer's size does not matter


def automatic_anchor(W0: Tensor, D: Tensor) -> float:
    """Return a relative anchor with which every angle of the fit to ``W0 + D`` is below 90°.

    ``max(1e-6, 1.001 ||W0^T D||_2 n / ||W0||_F^2)``, the norm by an upper bound at most n^(1/16)
    too large. Always safe, but it damps rotations strongly: a last resort.

    >>> automatic_anchor(torch.eye(2), torch.zeros(2, 2))
    1e-06
    """
    size = float(frobenius(W0))
    if size == 0:
        return 1e-6
    unit = size / math.sqrt(W0.shape[-1])
    G = (W0.double() / unit).mT @ (D.double() / unit)
    return max(1e-6, 1.001 * _spectral_bound(G))


def residual_noise_baseline(o: int, n: int) -> float:
    """Return the residual fraction ``||X - W0 R|| / ||D||`` that isotropic noise D leaves.

    ``sqrt(1 - n / (2 o))`` for o >= n, else ``sqrt(o / (2 n))``: only a layer clearly below it
    has been rotated.

    >>> round(residual_noise_baseline(100, 100), 4)
    0.7071
    """
    return math.sqrt(1 - n / (2 * o)) if o >= n else math.sqrt(o / (2 * n))


def rotational_limit(noise_level: float, weights: int, margin: float = 0.1) -> float:
    """Return how far below the level of noise a residual must be to count as rotational.

    ``min(1 - margin, max(1 - 3 sigma, 0.05))``, to be compared with the residual fraction over b:
    ``sigma = sqrt((1 - b^2) / (2 b^2 N))`` is the relative spread of b over draws of noise in a
    layer of N weights, so that small layers are not taken for rotated by chance.

    Args:
        noise_level: b, from ``residual_noise_baseline``.
        weights: N.
        margin: How clearly a large layer must beat noise.

    >>> round(rotational_limit(0.7071, 1024 * 1024), 3), round(rotational_limit(0.7071, 128), 2)
    (0.9, 0.81)
    """
    if noise_level <= 0 or weights <= 0:
        return 0.0
    square = noise_level**2
    sigma = math.sqrt((1 - square) / (2 * square * weights))
    return min(1 - margin, max(1 - _DEVIATIONS * sigma, _PURE))


def _spectral_bound(G: Tensor) -> float:
    """Return the Schatten-16 norm of G, never below the spectral one."""
    size = float(frobenius(G))
    if size == 0:
        return 0.0
    K = (G / size).mT @ (G / size)
    K = K @ K
    K = K @ K
    eighth: float = float(frobenius(K)) ** (1 / 8)
    return size * eighth
