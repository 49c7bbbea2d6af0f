"""How strong an anchor has to be, and what a rotation fit leaves of mere noise.

Numbers about a fit; the fit itself is in ``procrustes_fits``.
"""

from __future__ import annotations

import math

from torch import Tensor

from orthomerge.linalg.checks import frobenius

__all__ = ["automatic_anchor", "residual_noise_baseline"]


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
