"""Leading singular directions of tall or wide matrices, and frames built from several of them.

Singular vectors come from the smaller Gram matrix in float64: as accurate as needed for directions
that carry weight, and several times cheaper than a full decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.linalg.checks import require_finite
from orthomerge.linalg.precision import full_precision

__all__ = ["leading_directions", "orthonormal_frame"]

_NEGLIGIBLE = 1e-7  # relative to the largest singular value; Gram matrices resolve about 1e-8


@full_precision()
def leading_directions(
    D: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading singular triples of a matrix.

    ``D ≈ U diag(s) V^T``; D [m, n] -> U [m, r], s [r], V [n, r] in float64, s descending. r is
    ``rank`` or less: triples with ``s <= 1e-7 s_1`` are left out, as their directions are noise.

    Args:
        D: A matrix.
        rank: Most triples to return.

    Raises:
        NumericalError: D is not finite.

    >>> U, s, V = leading_directions(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> s
    tensor([3.], dtype=torch.float64)
    """
    X = require_finite(D, "the matrix").to(torch.float64)
    wide = X.shape[0] <= X.shape[1]
    gram = X @ X.mT if wide else X.mT @ X
    values, vectors = torch.linalg.eigh(gram)
    order = torch.arange(len(values) - 1, -1, -1, device=X.device)[:rank]
    s = values[order].clamp(min=0).sqrt()
    keep = s > _NEGLIGIBLE * s[:1].clamp(min=torch.finfo(X.dtype).tiny)
    near, s = vectors[:, order[keep]], s[keep]
    far = (X.mT if wide else X) @ near
    s = torch.linalg.vector_norm(far, dim=0)
    far = far / s
    return (near, s, far) if wide else (far, s, near)


@full_precision()
def orthonormal_frame(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the orthonormal frame nearest to frames put side by side: their polar factor.

    With ``U = [U_1, ..., U_T]``: ``U (U^T U)^{-1/2}``, the inverse root on the range of U only, so
    that directions which several blocks share are shared out. U_i [m, r_i] -> [m, sum r_i].

    Args:
        blocks: Matrices with orthonormal columns and equally many rows.

    >>> e = torch.eye(2, dtype=torch.float64)
    >>> torch.equal(orthonormal_frame([e[:, :1], e[:, 1:]]), e)
    True
    """
    U = torch.cat(list(blocks), dim=1)
    wide = U.shape[0] < U.shape[1]
    values, vectors = torch.linalg.eigh(U @ U.mT if wide else U.mT @ U)
    keep = values > 1e-10 * values[-1:].clamp(min=1e-300)
    root = torch.where(keep, values, 1.0).rsqrt() * keep
    inverse = (vectors * root) @ vectors.mT
    frame: torch.Tensor = inverse @ U if wide else U @ inverse
    return frame
