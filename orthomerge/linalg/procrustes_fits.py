"""Orthogonal Procrustes on the input side: the rotation of a weight that comes nearest another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from orthomerge.linalg.logarithms import log_so
from orthomerge.linalg.precision import full_precision
from orthomerge.linalg.rotations import inverse_cayley

__all__ = ["ProcrustesFit", "procrustes_right", "residual_noise_baseline"]


@dataclass(frozen=True)
class ProcrustesFit:
    """A fitted rotation."""

    frame: torch.Tensor | None
    core: torch.Tensor
    anchor: float
    retries: int
    residual: float
    report: Any
    reduction: str

    def rotation(self) -> torch.Tensor:
        """Return R."""
        return self.core

    def generator(self, chart: str = "cayley") -> torch.Tensor:
        """Return the skew matrix."""
        return log_so(self.core) if chart == "log" else inverse_cayley(self.core)

    def apply(self, W: torch.Tensor) -> torch.Tensor:
        """Return W R."""
        if self.core.ndim == 3:
            from orthomerge.linalg.blocks import rotate_columns

            return rotate_columns(W, self.core.to(W.dtype))
        return W @ self.core.to(W.dtype)


@full_precision()
def procrustes_right(
    W0: torch.Tensor,
    X: torch.Tensor,
    *,
    anchor: float = 1e-6,
    method: str = "auto",
    reduce: str = "auto",
    block: int | None = None,
    null: Literal["identity", "svd"] = "identity",
    special: bool = True,
) -> ProcrustesFit:
    """Return argmin ||W0 R - X||^2 + lambda ||R - I||^2."""
    n = W0.shape[1]
    b = block or n
    A = W0.double().reshape(len(W0), n // b, b).transpose(0, 1)
    B = X.double().reshape(len(W0), n // b, b).transpose(0, 1)
    M = A.mT @ B
    eye = torch.eye(b, dtype=torch.float64)
    base = torch.linalg.vector_norm(A) ** 2 / n
    retries = 0
    while True:
        U, S, Vh = torch.linalg.svd(M + anchor * base * eye)
        R = U @ Vh
        if null == "svd":
            break
        bad = (torch.linalg.det(R) < 0) | (torch.linalg.eigvalsh(R + R.mT).amin(-1) < -2 + 1e-6)
        if not bool(bad.any()):
            break
        anchor, retries = max(10 * anchor, 1e-6), retries + 1
    if block is None:
        R = R[0]
    R = R.to(W0.dtype)
    fit = ProcrustesFit(None, R, anchor, retries, 0.0, None, "dense")
    residual = float(torch.linalg.vector_norm(fit.apply(W0) - X))
    return ProcrustesFit(None, R, anchor, retries, residual, None, "dense")


def residual_noise_baseline(o: int, n: int) -> float:
    """Return the residual fraction that isotropic noise leaves."""
    return math.sqrt(1 - n / (2 * o)) if o >= n else math.sqrt(o / (2 * n))
