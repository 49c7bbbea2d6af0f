"""Make stacked blocks of rows orthogonal to each other, decided on their Gram matrix alone.

A stack W [R, d] of blocks W_i becomes ``V = C W``; only C is computed here, so that no cost depends
on d. The iterative solvers are in ``stack_descent``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orthomerge.errors import NumericalError
from orthomerge.linalg.precision import full_precision
from orthomerge.linalg.stack_descent import block_mask, descend_gd, descend_lbfgs

__all__ = ["StackSolver", "StackTransform", "mean_principal_cosine", "orthogonalise_stack"]

StackSolver = Literal["lowdin", "ridge", "gd", "lbfgs"]

_NULL = 1e-12  # eigenvalues of Gram matrices up to here, relative to the largest, are zero


@dataclass(frozen=True, slots=True)
class StackTransform:
    """What makes a stack orthogonal, ``V = C W``, and what it does; all of one batch shape.

    Attributes:
        C: Transformation [..., R, R] in float64.
        overlap_before: ``||off(W W^T)||_F / ||blkdiag(W W^T)||_F`` [...].
        overlap_after: The same of V.
        drift: ``||V - W||_F / ||W||_F`` [...].
        steps: Steps taken [...]; 0 for a closed form.
    """

    C: Tensor
    overlap_before: Tensor
    overlap_after: Tensor
    drift: Tensor
    steps: Tensor


@full_precision()
def orthogonalise_stack(
    G: Tensor,
    sizes: Sequence[int],
    solver: StackSolver = "lowdin",
    *,
    strength: float = 1.0,
    gamma: float = 10.0,
    normalise: bool = True,
    steps: int = 200,
    tolerance: float = 1e-6,
    null: float = _NULL,
    rate: float | None = None,
) -> StackTransform:
    """Return the C that lowers the overlap of a stack's blocks, from ``G = W W^T``.

    ``lowdin``: ``C = D^1/2 Ĝ^-t/2 D^-1/2``, ``D = blkdiag(G)``, ``Ĝ = D^-1/2 G D^-1/2``: at t = 1
    no overlap is left and ``V_i V_i^T = W_i W_i^T``, if the rows are independent.
    ``gd``, ``lbfgs``: minimise ``Σ_{i≠j} ||V_i V_j^T||_F^2 + γ ||V - W||_F^2``, starting at W.
    ``ridge``: one step of it, all blocks at once: ``V_i = W_i - W_i M^T (γ/2 I + M M^T)^-1 M``
    with M the other blocks; what all share is taken from each.

    Args:
        G: Gram matrix of the rows [..., R, R]; half precision and float32 are lifted to float64.
        sizes: Rows of each block, of sum R.
        solver: How.
        strength: t of lowdin; 0 changes nothing.
        gamma: γ of the others, what moving away from W costs.
        normalise: Divide W by the root mean square of its rows first, so that γ has no unit.
        steps: Most steps of gd and lbfgs.
        tolerance: Gradient relative to 1 + L at which they stop.
        null: Eigenvalues up to here, relative to the largest, are rounding and left out by lowdin.
        rate: A fixed step of gd instead of its line search.

    Returns:
        C and its report. Rows of zeros stay zero.

    Raises:
        NumericalError: G is not finite, or the sizes do not add up to R.

    References:
        Löwdin, J. Chem. Phys. 18 (1950) 365, for the symmetric orthogonalisation.

    >>> G = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> float(orthogonalise_stack(G, [1, 1]).overlap_after) < 1e-15
    True
    """
    G = _checked(G, sizes)
    N = G / (_mean_square(G) if normalise else G.new_ones(G.shape[:-2]))[..., None, None]
    taken = torch.zeros(G.shape[:-2], dtype=torch.int64, device=G.device)
    if len(sizes) < 2:
        C = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G).clone()
    elif solver == "lowdin":
        C = _lowdin(N, sizes, strength, null)
    elif solver == "ridge":
        C = _ridge(N, sizes, gamma)
    elif solver == "gd":
        C, taken = descend_gd(N, sizes, gamma, steps=steps, tolerance=tolerance, rate=rate)
    else:
        C, taken = descend_lbfgs(N, sizes, gamma, steps=steps, tolerance=tolerance)
    return _reported(C, G, sizes, taken)


@full_precision()
def mean_principal_cosine(G: Tensor, sizes: Sequence[int], above: float = 0.0) -> Tensor:
    """Return how far the blocks of a stack span the same space, over all pairs of blocks.

    The singular values of ``(W_i W_i^T)^-1/2 W_i W_j^T (W_j W_j^T)^-1/2`` are the cosines of the
    principal angles; their mean is 1 for equal spans, about ``sqrt(r / d)`` for unrelated ones.

    Args:
        G: Gram matrix of the rows [..., R, R].
        sizes: Rows of each block; blocks of zeros are left out.
        above: Where the cosines' root mean square, which is no less than their mean, is not above
            this, it is returned instead: no singular values are needed then.

    Returns:
        The mean [...] in float64; 0 where there are no two blocks.

    >>> float(mean_principal_cosine(torch.ones(2, 2), [1, 1]))
    1.0
    """
    G = _checked(G, sizes)
    inverse = _block_powers(G, sizes, -0.5, _NULL)
    whitened = inverse @ G @ inverse
    ranks = [W.diagonal(dim1=-2, dim2=-1).sum(-1).round() for W in _diagonal(whitened, sizes)]
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes))]
    count = sum(
        (torch.minimum(ranks[i], ranks[j]) for i, j in pairs), torch.zeros_like(G[..., 0, 0])
    )
    count = count.clamp(min=1)
    squares = (whitened * block_mask(G, sizes)).square().sum(dim=(-2, -1)) / 2
    bound = (squares / count).sqrt()
    if not bool((bound > above).any()):
        return bound
    total = torch.zeros_like(bound)
    parts = torch.split(whitened, list(sizes), -2)
    for i, j in pairs:
        cosines = torch.linalg.svdvals(torch.split(parts[i], list(sizes), -1)[j])
        total = total + cosines.sum(-1)
    return torch.where(bound > above, total / count, bound)


def _reported(C: Tensor, G: Tensor, sizes: Sequence[int], steps: Tensor) -> StackTransform:
    off = block_mask(G, sizes)
    K = C @ G @ C.mT
    return StackTransform(C, _overlap(G, off), _overlap(K, off), _drift(C, G), steps)


def _lowdin(G: Tensor, sizes: Sequence[int], strength: float, null: float) -> Tensor:
    half, inverse = _block_powers(G, sizes, 0.5, null), _block_powers(G, sizes, -0.5, null)
    return half @ _power(inverse @ G @ inverse, -strength / 2, null) @ inverse


def _ridge(G: Tensor, sizes: Sequence[int], gamma: float) -> Tensor:
    C = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G).clone()
    start = 0
    for size in sizes:
        own = torch.arange(start, start + size, device=G.device)
        others = torch.cat([torch.arange(start), torch.arange(start + size, G.shape[-1])]).to(own)
        M = G[..., others[:, None], others]
        shrunk = M + gamma / 2 * torch.eye(len(others), dtype=G.dtype, device=G.device)
        shared = torch.linalg.solve(shrunk, G[..., others[:, None], own])
        C[..., own[:, None], others] = -shared.mT
        start += size
    return C


def _power(S: Tensor, exponent: float, null: float) -> Tensor:
    """Return a power of symmetric positive matrices on their range, zero elsewhere."""
    values, vectors = torch.linalg.eigh(S)
    kept = values > null * values[..., -1:].clamp(min=torch.finfo(S.dtype).tiny)
    powers = torch.where(kept, values, 1.0) ** exponent * kept
    power: Tensor = (vectors * powers[..., None, :]) @ vectors.mT
    return power


def _block_powers(G: Tensor, sizes: Sequence[int], exponent: float, null: float) -> Tensor:
    powers = torch.zeros_like(G)
    for block, target in zip(_diagonal(G, sizes), _diagonal(powers, sizes), strict=True):
        if block.shape[-1]:
            target.copy_(_power(block, exponent, null))
    return powers


def _diagonal(X: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    rows = torch.split(X, list(sizes), -2)
    return [torch.split(row, list(sizes), -1)[at] for at, row in enumerate(rows)]


def _overlap(K: Tensor, off: Tensor) -> Tensor:
    outside = torch.linalg.matrix_norm(K * off)
    inside = torch.linalg.matrix_norm(K * (1 - off))
    ratio: Tensor = outside / torch.where(inside > 0, inside, 1.0)
    return ratio


def _drift(C: Tensor, G: Tensor) -> Tensor:
    moved = C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    squares = ((moved @ G) * moved).sum(dim=(-2, -1)).clamp(min=0)
    size = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (squares / torch.where(size > 0, size, 1.0)).sqrt()


def _mean_square(G: Tensor) -> Tensor:
    rows = G.diagonal(dim1=-2, dim2=-1)
    mean = rows.sum(-1) / (rows > 0).sum(-1).clamp(min=1)
    return torch.where(mean > 0, mean, 1.0)


def _checked(G: Tensor, sizes: Sequence[int]) -> Tensor:
    if G.shape[-1] != G.shape[-2] or sum(sizes) != G.shape[-1]:
        raise NumericalError(
            "a stack's Gram matrix has one row for each row of its blocks",
            expected=f"{sum(sizes)} x {sum(sizes)}",
            found=list(G.shape),
        )
    G = G.double()
    if not bool(torch.isfinite(G.diagonal(dim1=-2, dim2=-1)).all()):
        raise NumericalError("the stack is not finite", remedy="One of its blocks is damaged.")
    return G
