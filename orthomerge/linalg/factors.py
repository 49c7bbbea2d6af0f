"""Matrices of low rank as two factors, ``X = B A``: sums, norms, truncation, never multiplied out.

Every cost is linear in o + n; what is decided, is decided on r x r matrices in float64. Factors of
a dense matrix are ``truncation``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import require_finite
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = [
    "Factors",
    "balanced",
    "balancing",
    "concatenated",
    "gram",
    "singular_values",
    "stacked",
    "truncated",
    "truncated_with_values",
]

# What rounding leaves of a singular value that is zero, relative to sum ||b_k|| ||a_k||: float64
# factors are decomposed themselves, float32 ones through their Gram matrices, hence the root.
_EXACT, _BY_GRAM = 1e-14, 1e-7
_PANEL, _COLUMNS = 64, 2048  # how a large Gram matrix is taken apart


@dataclass(frozen=True, slots=True)
class Factors:
    """A matrix of low rank, ``B A``; or a batch of equal-shaped ones.

    Attributes:
        B: Left factor [..., o, r].
        A: Right factor [..., r, n], of the same batch dimensions.

    >>> Factors(torch.ones(3, 1), torch.ones(1, 2)).shape
    (3, 2)
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        matrices = self.B.ndim >= 2 and self.A.ndim >= 2
        if not matrices or (*self.B.shape[:-2], self.B.shape[-1]) != tuple(self.A.shape[:-1]):
            raise NumericalError(
                "the two factors do not fit together",
                expected="B [..., o, r] and A [..., r, n]",
                found=f"{list(self.B.shape)} and {list(self.A.shape)}",
            )

    @property
    def rank(self) -> int:
        """The inner dimension r: the rank of ``B A`` is this or less."""
        return self.A.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of ``B A``, without the batch dimensions."""
        return self.B.shape[-2], self.A.shape[-1]

    @full_precision()
    def dense(self) -> Tensor:
        """Return the product [..., o, n], at least in float32."""
        dtype = working_dtype(self.B, self.A)
        return self.B.to(dtype) @ self.A.to(dtype)

    def scaled(self, c: float | Tensor) -> Factors:
        """Return ``c B A``; c is a number, or one number per matrix of the batch."""
        if not isinstance(c, Tensor) and c == 1:
            return self
        by = c[..., None, None].to(self.A) if isinstance(c, Tensor) else c
        return Factors(self.B, self.A * by)

    def turned(self) -> Factors:
        """Return the transpose, ``A^T B^T``."""
        return Factors(self.A.mT, self.B.mT)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Factors:
        """Return the factors in another dtype or on another device."""
        return Factors(self.B.to(device, dtype), self.A.to(device, dtype))

    def item(self, at: int) -> Factors:
        """Return one matrix of a batch."""
        return Factors(self.B[at], self.A[at])

    def padded(self, rank: int) -> Factors:
        """Return the same matrix with zeros up to an inner dimension."""
        more = rank - self.rank
        if more <= 0:
            return self
        pad = torch.nn.functional.pad
        return Factors(pad(self.B, (0, more)), pad(self.A, (0, 0, 0, more)))

    def norm(self) -> Tensor:
        """Return ``||B A||_F`` [...] in float64, resolved to about 1e-8 of ``||B|| ||A||``.

        ``||B A||_F^2 = tr((B^T B)(A A^T))``.
        """
        return (gram(self.B.mT) * gram(self.A)).sum(dim=(-2, -1)).clamp(min=0).sqrt()

    @full_precision()
    def inner(self, other: Factors) -> Tensor:
        """Return ``<B A, B' A'> = tr((B^T B')(A' A^T))`` [...] in float64."""
        left = self.B.double().mT @ other.B.double()
        right = self.A.double() @ other.A.double().mT
        return (left * right).sum(dim=(-2, -1))

    @full_precision()
    def column_norms(self) -> Tensor:
        """Return the norm of every column of ``B A`` [..., n], at least in float32.

        ``||B a_j|| = ||R a_j||`` with ``R^T R = B^T B``.
        """
        dtype = working_dtype(self.B, self.A)
        root = _root(self.B).to(dtype)
        norms: Tensor = torch.linalg.vector_norm(root @ self.A.to(dtype), dim=-2)
        return norms

    def row_norms(self) -> Tensor:
        """Return the norm of every row of ``B A`` [..., o], at least in float32."""
        return self.turned().column_norms()


def concatenated(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Return a weighted sum without loss, by putting the factors side by side.

    ``Σ w_i B_i A_i = [B_1 … B_N] [w_1 A_1; …; w_N A_N]``, of rank ``Σ r_i``.

    Args:
        parts: Matrices of one shape, their ranks may differ.
        weights: w_i; 1 each by default.

    Raises:
        NumericalError: There is no part, the shapes differ, or there is not one weight each.

    >>> one = Factors(torch.ones(2, 1), torch.ones(1, 2))
    >>> concatenated([one, one], [1.0, 2.0]).dense()
    tensor([[3., 3.],
            [3., 3.]])
    """
    shapes = {(*F.B.shape[:-1], F.A.shape[-1]) for F in parts}
    if len(shapes) != 1:
        raise NumericalError(
            "only matrices of one shape can be added", expected="one shape", found=sorted(shapes)
        )
    if weights is None:
        weights = [1.0] * len(parts)
    if len(weights) != len(parts):
        raise NumericalError("one weight per part", expected=len(parts), found=len(weights))
    dtype = working_dtype(*(X for F in parts for X in (F.B, F.A)))
    rows = [
        F.A.to(dtype) * w if w != 1 else F.A.to(dtype) for F, w in zip(parts, weights, strict=True)
    ]
    return Factors(torch.cat([F.B.to(dtype) for F in parts], -1), torch.cat(rows, -2))


def stacked(parts: Sequence[Factors]) -> Factors:
    """Return matrices of one shape as a batch, with zeros up to the largest inner dimension.

    >>> one = Factors(torch.ones(2, 1), torch.ones(1, 3))
    >>> stacked([one, one.padded(2)]).B.shape
    torch.Size([2, 2, 2])
    """
    rank = max(part.rank for part in parts)
    padded = [part.padded(rank) for part in parts]
    return Factors(torch.stack([p.B for p in padded]), torch.stack([p.A for p in padded]))


def balanced(F: Factors) -> Factors:
    """Return the factors that share the singular values evenly, without loss.

    ``B A = U S V^T`` gives ``B' = U sqrt(S)``, ``A' = sqrt(S) V^T``, of rank min(r, o, n). Other
    factors of the same matrix, ``B M^-1`` and ``M A``, give the same result but for the signs.

    Raises:
        NumericalError: A factor is not finite.

    >>> F = balanced(Factors(torch.tensor([[8.0]]), torch.tensor([[0.5]])))
    >>> float(F.B.abs()), float(F.A.abs())
    (2.0, 2.0)
    """
    return _evenly_split(F, min(F.rank, *F.shape), _core(F))


def truncated(F: Factors, rank: int) -> Factors:
    """Return the best approximation by a matrix of lower rank, split evenly over its factors.

    ``R_B^T R_B = B^T B`` and ``R_A^T R_A = A A^T`` (from QR, or from Gram matrices), ``P S Z^T =
    R_B R_A^T``; the k largest triples give ``B' = B R_A^T Z S^-1/2``, ``A' = S^-1/2 P^T R_B A``.

    Args:
        F: The matrix.
        rank: k; the result's rank is min(k, r, o, n), with zeros where B A has no such rank.

    Raises:
        NumericalError: A factor is not finite, or the rank is below 1.

    >>> truncated(Factors(torch.eye(2), torch.diag(torch.tensor([3.0, 4.0]))), 1).dense()
    tensor([[0., 0.],
            [0., 4.]])
    """
    return truncated_with_values(F, rank)[0]


def truncated_with_values(F: Factors, rank: int) -> tuple[Factors, Tensor]:
    """Return ``truncated`` and all ``singular_values``, which it costs nothing to know by then.

    Raises:
        NumericalError: A factor is not finite, or the rank is below 1.

    >>> F = Factors(torch.eye(2), torch.diag(torch.tensor([3.0, 4.0])))
    >>> truncated_with_values(F, 1)[1]
    tensor([4., 3.], dtype=torch.float64)
    """
    if rank < 1:
        raise NumericalError("the rank must be at least 1", found=rank)
    core = _core(F)
    return _evenly_split(F, min(rank, F.rank, *F.shape), core), core.values


def singular_values(F: Factors) -> Tensor:
    """Return the singular values of ``B A`` [..., min(r, o, n)] in float64, descending.

    Those that rounding cannot tell from zero are zero.

    Raises:
        NumericalError: A factor is not finite.

    >>> singular_values(Factors(torch.eye(2), torch.diag(torch.tensor([3.0, 4.0]))))
    tensor([4., 3.], dtype=torch.float64)
    """
    return _core(F).values


@full_precision()
def gram(X: Tensor) -> Tensor:
    """Return ``X X^T`` of rows [..., r, d] -> [..., r, r] in float64.

    >>> gram(torch.tensor([[3.0, 4.0]]))
    tensor([[25.]], dtype=torch.float64)
    """
    rank = X.shape[-2]
    if X.device.type != "cpu" or rank <= _PANEL:
        rows = X.double()
        return rows @ rows.mT
    # One triangle, and few columns at a time: their float64 copy stays in the cache.
    G = X.new_zeros(*X.shape[:-1], rank, dtype=torch.float64)
    for start in range(0, X.shape[-1], _COLUMNS):
        rows = X[..., start : start + _COLUMNS].double()
        for at in range(0, rank, _PANEL):
            below = at + _PANEL
            G[..., at:below, :below] += rows[..., at:below, :] @ rows[..., :below, :].mT
    lower = G.tril()
    return lower + lower.tril(-1).mT


@full_precision()
def balancing(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what balances factors, from their Gram matrices alone.

    ``B' = B X`` and ``A' = Y A`` are ``balanced``'s, with zeros where B A has a lower rank:
    singular values below 1e-7 ``Σ ||b_k|| ||a_k||`` are dropped, as Gram matrices do not resolve
    them.

    Args:
        left: ``B^T B`` [..., r, r] in float64.
        right: ``A A^T`` [..., r, r] in float64.

    Returns:
        X [..., r, r], Y [..., r, r] and the singular values [..., r] in float64.

    >>> X, Y, S = balancing(torch.eye(1).double() * 64, torch.eye(1).double() / 4)
    >>> float(X.abs()), float(Y.abs()), float(S)
    (0.25, 4.0, 4.0)
    """
    core = _decomposed(_gram_root(left), _gram_root(right), _BY_GRAM, left.shape[-1])
    return *core.halves(left.shape[-1]), core.values


@dataclass(frozen=True, slots=True)
class _Core:
    """``P S Z^T = R_B R_A^T``; the singular values of noise are zero."""

    left: Tensor  # R_B
    right: Tensor  # R_A
    P: Tensor
    values: Tensor
    Zh: Tensor

    def halves(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return ``R_A^T Z S^-1/2`` and ``S^-1/2 P^T R_B``, of the largest singular values."""
        S = self.values[..., :rank]
        root = torch.where(S > 0, S, 1.0).rsqrt() * (S > 0)
        columns = self.right.mT @ self.Zh[..., :rank, :].mT * root[..., None, :]
        return columns, root[..., :, None] * (self.P[..., :rank].mT @ self.left)


@full_precision()
def _core(F: Factors) -> _Core:
    require_finite(F.B, "the left factor")
    require_finite(F.A, "the right factor")
    dtype = working_dtype(F.B, F.A)
    tolerance = _EXACT if dtype == torch.float64 else _BY_GRAM
    left, right = _root(F.B.to(dtype)), _root(F.A.to(dtype).mT)
    return _decomposed(left, right, tolerance, min(F.rank, *F.shape))


def _decomposed(left: Tensor, right: Tensor, tolerance: float, rank: int) -> _Core:
    P, S, Zh = torch.linalg.svd(left @ right.mT, full_matrices=False)
    norms = torch.linalg.vector_norm(left, dim=-2) * torch.linalg.vector_norm(right, dim=-2)
    noise = tolerance * norms.sum(-1, keepdim=True)
    S = torch.where(noise < S, S, 0.0)[..., :rank]
    return _Core(left, right, P[..., :rank], S, Zh[..., :rank, :])


@full_precision()
def _evenly_split(F: Factors, rank: int, core: _Core) -> Factors:
    columns, rows = core.halves(rank)
    dtype = working_dtype(F.B, F.A)
    return Factors(F.B.to(dtype) @ columns.to(dtype), rows.to(dtype) @ F.A.to(dtype))


def _root(X: Tensor) -> Tensor:
    """Return R with ``R^T R = X^T X`` [..., k, r] in float64, k at most r; X [..., d, r]."""
    if X.dtype == torch.float64:
        R: Tensor = torch.linalg.qr(X, mode="r").R
        return R
    return _gram_root(gram(X.mT))


def _gram_root(G: Tensor) -> Tensor:
    """Return R with ``R^T R = G`` [..., r, r].

    Columns are scaled to length 1 first, so that columns of very different lengths are resolved
    alike.
    """
    lengths = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    safe = torch.where(lengths > 0, lengths, 1.0)
    values, vectors = torch.linalg.eigh(G / (safe[..., :, None] * safe[..., None, :]))
    R: Tensor = values.clamp(min=0).sqrt()[..., :, None] * vectors.mT * lengths[..., None, :]
    return R
