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
from orthomerge.linalg.block_diagonals import block_mask, blocks_times, diagonal_blocks
from orthomerge.linalg.precision import full_precision
from orthomerge.linalg.stack_descent import descend_gd, descend_lbfgs

__all__ = [
    "StackSolver",
    "StackTransform",
    "Whitened",
    "mean_principal_cosine",
    "orthogonalise_stack",
    "stack_overlap",
    "whitened_stack",
]

StackSolver = Literal["lowdin", "ridge", "gd", "lbfgs"]

_NULL = 1e-12  # eigenvalues of Gram matrices up to here, relative to the largest, are zero


@dataclass(frozen=True, slots=True)
class StackTransform:
    """What makes a stack orthogonal, ``V = C W``, and what it does; all of one batch shape.

    Attributes:
        C: Transformation [..., R, R] in float64.
        gram: ``V V^T`` [..., R, R].
        overlap_before: ``||off(W W^T)||_F / ||blkdiag(W W^T)||_F`` [...].
        overlap_after: The same of V.
        drift: ``||V - W||_F / ||W||_F`` [...].
        steps: Steps taken [...]; 0 for a closed form.
    """

    C: Tensor
    gram: Tensor
    overlap_before: Tensor
    overlap_after: Tensor
    drift: Tensor
    steps: Tensor


@dataclass(frozen=True, slots=True)
class Whitened:
    """A stack whose blocks have orthonormal rows, ``D^-1/2 W`` with ``D = blkdiag(W W^T)``.

    Attributes:
        half: Blocks of ``D^1/2`` [..., N, m, m], padded with zeros.
        inverse: Blocks of ``D^-1/2``, zero where D is.
        gram: ``D^-1/2 W W^T D^-1/2`` [..., R, R].
        ranks: Rank of every block [..., N].
    """

    half: Tensor
    inverse: Tensor
    gram: Tensor
    ranks: Tensor


@full_precision()
def whitened_stack(G: Tensor, sizes: Sequence[int], null: float = _NULL) -> Whitened:
    """Whiten every block of a stack by itself, from its Gram matrix alone.

    Args:
        G: Gram matrix of the rows [..., R, R].
        sizes: Rows of each block.
        null: Eigenvalues of a block up to here, relative to its largest, are rounding.

    Raises:
        NumericalError: G is not finite, or the sizes do not add up to R.
    """
    G = _checked(G, sizes)
    values, vectors = torch.linalg.eigh(diagonal_blocks(G, sizes))
    kept = values > null * values[..., -1:].clamp(min=torch.finfo(G.dtype).tiny)
    roots = torch.where(kept, values, 0.0).sqrt()[..., None, :]
    inverses = torch.where(kept, values, 1.0).rsqrt()[..., None, :] * kept[..., None, :]
    half, inverse = (vectors * roots) @ vectors.mT, (vectors * inverses) @ vectors.mT
    left = blocks_times(inverse, G, sizes)
    return Whitened(half, inverse, blocks_times(inverse, left.mT, sizes).mT, kept.sum(-1))


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
    whitened: Whitened | None = None,
) -> StackTransform:
    """Return the C that lowers the overlap of a stack's blocks, from ``G = W W^T``.

    ``lowdin``: ``C = D^1/2 Ĝ^-t/2 D^-1/2``, ``D = blkdiag(G)``, ``Ĝ = D^-1/2 G D^-1/2``: at t = 1
    no overlap is left and ``V_i V_i^T = W_i W_i^T``, if the rows are independent.
    ``gd``, ``lbfgs``: minimise ``Σ_{i≠j} ||V_i V_j^T||_F^2 + γ ||V - W||_F^2``, starting at W.
    ``ridge``: one step of it for all blocks, ``V_i = W_i - W_i M^T (γ/2 I + M M^T)^-1 M``, M the
    other blocks; what all share is taken from each.

    Args:
        G: Gram matrix of the rows [..., R, R]; lifted to float64.
        sizes: Rows of each block, of sum R.
        solver: How.
        strength: t of lowdin; 0 changes nothing.
        gamma: γ of the others, what moving away from W costs.
        normalise: Divide W by the root mean square of its rows first, so that γ has no unit.
        steps: Most steps of gd and lbfgs.
        tolerance: Gradient relative to 1 + L at which they stop.
        null: Eigenvalues up to here, relative to the largest, are rounding and left out.
        rate: A fixed step of gd instead of its line search.
        whitened: What ``whitened_stack`` made of G, if that is known.

    Returns:
        C and its report. Rows of zeros stay zero.

    References:
        Löwdin, J. Chem. Phys. 18 (1950) 365, for the symmetric orthogonalisation.

    >>> float(orthogonalise_stack(torch.ones(2, 2) + torch.eye(2), [1, 1]).overlap_after) < 1e-15
    True
    """
    G = _checked(G, sizes)
    N = G / (_mean_square(G) if normalise else G.new_ones(G.shape[:-2]))[..., None, None]
    taken = torch.zeros(G.shape[:-2], dtype=torch.int64, device=G.device)
    if len(sizes) < 2:
        C = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G).clone()
    elif solver == "lowdin":
        C = _lowdin(whitened or whitened_stack(G, sizes, null), sizes, strength, null)
    elif solver == "ridge":
        C = _ridge(N, sizes, gamma)
    elif solver == "gd":
        C, taken = descend_gd(
            N, sizes, gamma, steps=steps, tolerance=tolerance, null=null, rate=rate
        )
    else:
        C, taken = descend_lbfgs(N, sizes, gamma, steps=steps, tolerance=tolerance, null=null)
    return _reported(C, G, sizes, taken)


@full_precision()
def mean_principal_cosine(W: Whitened, sizes: Sequence[int], above: float = 0.0) -> Tensor:
    """Return how far the blocks of a stack span the same space, over all pairs of blocks.

    The singular values of ``(W_i W_i^T)^-1/2 W_i W_j^T (W_j W_j^T)^-1/2`` are the cosines of the
    principal angles; their mean is 1 for equal spans, about ``sqrt(r / d)`` for unrelated ones.

    Args:
        W: The whitened stack.
        sizes: Rows of each block; blocks of zeros are left out.
        above: Where the cosines' root mean square, which is no less than their mean, is not above
            this, it is returned instead: no singular values are needed then.

    Returns:
        The mean [...] in float64; 0 where there are no two blocks.

    >>> float(mean_principal_cosine(whitened_stack(torch.ones(2, 2), [1, 1]), [1, 1]))
    1.0
    """
    smaller = torch.minimum(W.ranks[..., :, None], W.ranks[..., None, :])
    count = smaller.triu(1).sum(dim=(-2, -1)).clamp(min=1)
    squares = (W.gram * block_mask(W.gram, sizes)).square().sum(dim=(-2, -1)) / 2
    bound = (squares / count).sqrt()
    if not bool((bound > above).any()):
        return bound
    total, parts = torch.zeros_like(bound), torch.split(W.gram, list(sizes), -2)
    for i in range(len(sizes)):
        for j in range(i + 1, len(sizes)):
            cosines = torch.linalg.svdvals(torch.split(parts[i], list(sizes), -1)[j])
            total = total + cosines.sum(-1)
    return torch.where(bound > above, total / count, bound)


def stack_overlap(G: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return how far blocks are from orthogonal, ``||off(G)||_F / ||blkdiag(G)||_F`` [...].

    >>> float(stack_overlap(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), [1, 1]))
    0.5
    """
    off = block_mask(G, sizes)
    inside = torch.linalg.matrix_norm(G * (1 - off))
    ratio: Tensor = torch.linalg.matrix_norm(G * off) / torch.where(inside > 0, inside, 1.0)
    return ratio


def _reported(C: Tensor, G: Tensor, sizes: Sequence[int], steps: Tensor) -> StackTransform:
    CG = C @ G
    moved = C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    squares = ((CG - G) * moved).sum(dim=(-2, -1)).clamp(min=0)
    size = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    drift, K = (squares / torch.where(size > 0, size, 1.0)).sqrt(), CG @ C.mT
    return StackTransform(C, K, stack_overlap(G, sizes), stack_overlap(K, sizes), drift, steps)


def _lowdin(W: Whitened, sizes: Sequence[int], strength: float, null: float) -> Tensor:
    values, vectors = torch.linalg.eigh(W.gram)
    kept = values > null * values[..., -1:].clamp(min=torch.finfo(values.dtype).tiny)
    powers = torch.where(kept, values, 1.0) ** (-strength / 2) * kept
    left = blocks_times(W.half, vectors * powers[..., None, :], sizes)
    right = blocks_times(W.inverse, vectors, sizes)  # D^-1/2 is symmetric
    C: Tensor = left @ right.mT
    return C


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
