"""Is a matrix orthogonal, skew-symmetric, finite? Answers come with the residual that decided.

Measures only; nothing is projected or repaired here.
"""

from __future__ import annotations

import math

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["frobenius", "orthogonality", "require_finite", "skewness"]


@full_precision()
def orthogonality(R: torch.Tensor, tolerance: float | None = None) -> tuple[bool, float]:
    """Measure how far ``R`` is from orthogonal.

    ``max over the batch of ||R^T R - I||_F / sqrt(n)``, R [..., n, n].

    Args:
        R: Square matrices, any batch dimensions. Half precision is measured in float32, with
            the tolerance of the stored dtype.
        tolerance: Largest residual that counts as orthogonal; by default ``16 sqrt(n) eps``,
            which a float32 Cayley map meets with a margin of three at angles up to 3 rad.

    Returns:
        Whether the residual is within the tolerance, and the residual. A matrix that is not
        finite has residual inf.

    >>> orthogonality(torch.eye(3))
    (True, 0.0)
    """
    size = R.shape[-1]
    X = R.to(working_dtype(R))
    gram = X.mT @ X
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    residual = _largest(frobenius(gram) / math.sqrt(max(size, 1)))
    limit = 16 * math.sqrt(size) * torch.finfo(R.dtype).eps if tolerance is None else tolerance
    return residual <= limit, residual


def skewness(A: torch.Tensor, tolerance: float | None = None) -> tuple[bool, float]:
    """Measure how far ``A`` is from skew-symmetric.

    ``max over the batch of ||A + A^T||_F / ||A||_F``, 0 for a zero matrix; A [..., n, n].

    Args:
        A: Square matrices, any batch dimensions.
        tolerance: Largest residual that counts as skew; by default ``16 sqrt(n) eps``.

    Returns:
        Whether the residual is within the tolerance, and the residual; inf if not finite.

    >>> skewness(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    (True, 0.0)
    """
    X = A.to(working_dtype(A))
    norm = frobenius(X)
    residual = _largest(frobenius(X + X.mT) / torch.where(norm > 0, norm, 1.0))
    size = A.shape[-1]
    limit = 16 * math.sqrt(size) * torch.finfo(A.dtype).eps if tolerance is None else tolerance
    return residual <= limit, residual


def require_finite(X: torch.Tensor, what: str) -> torch.Tensor:
    """Return ``X`` unchanged, or refuse it when it holds a NaN or an infinity.

    Args:
        X: Any tensor.
        what: What the tensor is, for the message.

    Raises:
        NumericalError: An element is not finite.

    >>> require_finite(torch.zeros(2), "the input")
    tensor([0., 0.])
    """
    count = X.numel() - int(torch.isfinite(X).sum())
    if count:
        raise NumericalError(
            f"{what} is not finite",
            found=f"{count} of {X.numel()} elements NaN or infinite",
            remedy="The source is damaged or its training diverged; leave it out.",
        )
    return X


def frobenius(X: torch.Tensor) -> torch.Tensor:
    """Return the Frobenius norm over the last two axes, in float64; X [..., m, n] -> [...].

    Row norms first: float32 sums over 16 million elements at once lose a part in a thousand.

    >>> frobenius(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    tensor(5., dtype=torch.float64)
    """
    rows = torch.linalg.vector_norm(X, dim=-1)
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norms


def _largest(residuals: torch.Tensor) -> float:
    if residuals.numel() == 0:
        return 0.0
    value = float(residuals.max())
    return value if math.isfinite(value) else math.inf
