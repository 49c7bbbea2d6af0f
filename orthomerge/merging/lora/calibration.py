"""Turn down directions of the outputs that the B factors of many models share.

Which norm the merged change gets afterwards is the method's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.linalg.factors import Factors
from orthomerge.linalg.precision import full_precision

__all__ = ["damped_outputs"]


@full_precision()
def damped_outputs(
    factors: Sequence[Factors], weights: Sequence[float]
) -> tuple[list[Factors], float]:
    """Return the factors with shared directions of B damped, and the strongest damping.

    ``[B_1 | … | B_N] = U diag(σ) V^T``, ``s_k = σ_k² / Σ σ²``, ``a_k = 1 / (1 + (N - 1) s_k)``;
    ``B_i + U diag(a - 1) U^T B_i``. N counts the models with a weight and a change that are not
    zero, and only they make U.

    Args:
        factors: B_i [o, r_i], A_i [r_i, n], one per model.
        weights: w_i, one per model.

    Returns:
        The factors, and min_k a_k.

    >>> B = torch.tensor([[1.0], [0.0]])
    >>> parts, least = damped_outputs([Factors(B, torch.eye(1)), Factors(B, torch.eye(1))], [1, 1])
    >>> parts[0].B.T, least
    (tensor([[0.5000, 0.0000]]), 0.5)
    """
    counted = [f.B.double() for f, w in zip(factors, weights, strict=True) if w and f.norm() > 0]
    if len(counted) < 2:
        return list(factors), 1.0
    # The singular vectors of the stack are those of R in its QR decomposition, turned by Q.
    Q, R = torch.linalg.qr(torch.cat(counted, dim=-1))
    left, sigma, _ = torch.linalg.svd(R, full_matrices=False)
    U, shares = Q @ left, sigma.square() / sigma.square().sum()
    a = 1 / (1 + (len(counted) - 1) * shares)
    damped = [
        Factors((f.B.double() + U @ ((a - 1)[:, None] * (U.mT @ f.B.double()))).to(f.B.dtype), f.A)
        for f in factors
    ]
    return damped, float(a.min())
