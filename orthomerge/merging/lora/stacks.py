"""The low-rank updates of one module side by side: their gauge, and making them orthogonal.

Everything is decided on the R x R Gram matrices of both sides; the factors themselves are
multiplied once, when a result is asked for. How magnitudes are merged is in ``magnitudes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from orthomerge.errors import NumericalError
from orthomerge.linalg.block_diagonals import block_owners, blocks_times, diagonal_blocks
from orthomerge.linalg.factors import Factors, balancing, concatenated, gram
from orthomerge.linalg.orthogonal_stacks import (
    Whitened,
    mean_principal_cosine,
    orthogonalise_stack,
    stack_overlap,
    whitened_stack,
)
from orthomerge.linalg.precision import full_precision
from orthomerge.linalg.stack_descent import adam_stack

__all__ = ["Orthogonalise", "Side", "Stack", "Target", "balance", "orthogonalise", "per_row"]

Orthogonalise = Literal["lowdin", "lbfgs", "gd", "adam", "ridge", "none"]
Target = Literal["auto", "A", "B", "both"]

_NEGLIGIBLE = 1e-7  # ||B A|| relative to ||B|| ||A|| below which an update is rounding
_SHARED = 0.9  # mean principal cosine above which a side is one frame that all adapters share
_NULL = {torch.float64: 1e-12, torch.float32: 1e-10}  # float32 rows blur what is nearly dependent


@dataclass(frozen=True, slots=True)
class Side:
    """The left or the right factors of all adapters: rows ``T X``, not multiplied out.

    Attributes:
        rows: X [..., R, d] as they were given: columns of the B_i, or rows of the A_i.
        transform: T [..., R, R] in float64.
        gram: ``T X X^T T^T`` [..., R, R] in float64.
    """

    rows: Tensor
    transform: Tensor
    gram: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Side:
        """Take rows as they are."""
        G = gram(rows)
        return cls(rows, torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G), G)

    def changed(self, blocks: Tensor, ranks: Sequence[int]) -> Side:
        """Return the rows multiplied by a block-diagonal matrix, adapter by adapter."""
        T, G = (blocks_times(blocks, X, ranks) for X in (self.transform, self.gram))
        return Side(self.rows, T, blocks_times(blocks, G.mT, ranks).mT)

    def multiplied(self, by: Tensor | None = None) -> Tensor:
        """Return ``T X``, its rows multiplied by numbers [..., R]."""
        T = self.transform if by is None else by[..., None] * self.transform
        T = T.to(self.rows.dtype)
        # In the rows' own memory layout: the left side's are columns of B.
        return T @ self.rows if self.rows.is_contiguous() else (self.rows.mT @ T.mT).mT


@dataclass(frozen=True, slots=True)
class Stack:
    """N updates ``D_i = B_i A_i`` of one module, or of a batch of equal-shaped ones.

    Attributes:
        left: The B_i; rows of this side are columns of B.
        right: The A_i.
        ranks: r_i, of sum R.
        given: w_i as given, one number per adapter.
        weights: w_i [..., N] in float64; 0 where an update is zero, which takes no part then.
    """

    left: Side
    right: Side
    ranks: tuple[int, ...]
    given: tuple[float, ...]
    weights: Tensor

    @classmethod
    def of(cls, factors: Sequence[Factors], weights: Sequence[float]) -> Stack:
        """Put updates side by side; those that are zero but for rounding become zero.

        Args:
            factors: One update per adapter; ranks may differ.
            weights: w_i, one per adapter.

        Raises:
            NumericalError: An update is not finite, or shapes differ.
        """
        joined, ranks = concatenated(factors), tuple(F.rank for F in factors)
        left, right = Side.of(joined.B.mT), Side.of(joined.A)
        _require_finite(_diagonal(left.gram) + _diagonal(right.gram), ranks)
        owner = _owners(left.gram, ranks)
        sizes = [_diagonal(side.gram) @ owner for side in (left, right)]
        squares = _block_sums(left.gram * right.gram, ranks)
        live = squares > _NEGLIGIBLE**2 * sizes[0] * sizes[1]
        w = torch.tensor(list(weights), dtype=left.gram.dtype, device=left.gram.device) * live
        if not bool(live.all()):
            kept = live.to(w.dtype)[..., None, None] * torch.eye(max(ranks)).to(w)
            left, right = left.changed(kept, ranks), right.changed(kept, ranks)
        return cls(left, right, ranks, tuple(weights), w)

    @property
    def count(self) -> Tensor:
        """Number of adapters that take part [...]."""
        return (self.weights != 0).sum(-1)

    def turned(self) -> Stack:
        """Return the stack of the transposes."""
        return replace(self, left=self.right, right=self.left)

    def norms(self) -> Tensor:
        """Return every ``||D_i||_F`` [..., N] in float64."""
        return _block_sums(self.left.gram * self.right.gram, self.ranks).clamp(min=0).sqrt()

    def sum_norm(self) -> Tensor:
        """Return ``||Σ w_i D_i||_F`` [...] in float64."""
        w = per_row(self.weights, self.ranks)
        product = self.left.gram * self.right.gram * w[..., :, None] * w[..., None, :]
        return product.sum(dim=(-2, -1)).clamp(min=0).sqrt()

    @full_precision()
    def sum(self, columns: Tensor | None = None) -> Factors:
        """Return ``Σ w_i D_i diag(c_i)`` of rank R.

        Args:
            columns: c_i [..., N, n]; 1 by default.
        """
        A = self.right.multiplied(per_row(self.weights, self.ranks))
        if columns is not None:
            A = A * per_row(columns.to(A), self.ranks, -2)
        return Factors(self.left.multiplied().mT, A)

    @full_precision()
    def parts(self, columns: Tensor | None = None) -> list[Factors]:
        """Return every ``D_i diag(c_i)``, without the weights."""
        A = self.right.multiplied()
        if columns is not None:
            A = A * per_row(columns.to(A), self.ranks, -2)
        lefts = torch.split(self.left.multiplied().mT, list(self.ranks), -1)
        rights = torch.split(A, list(self.ranks), -2)
        return [Factors(*both) for both in zip(lefts, rights, strict=True)]


@full_precision()
def balance(stack: Stack) -> Stack:
    """Share each update's singular values evenly between its factors.

    ``D_i = U S V^T`` gives ``B_i = U sqrt(S)``, ``A_i = sqrt(S) V^T``. What follows then depends
    on the updates alone, and not on how training has split them: ``B M^-1, M A`` is the same D.
    """
    left, right = (diagonal_blocks(side.gram, stack.ranks) for side in (stack.left, stack.right))
    X, Y, _ = balancing(left, right)
    sides = stack.left.changed(X.mT, stack.ranks), stack.right.changed(Y, stack.ranks)
    return replace(stack, left=sides[0], right=sides[1])


@full_precision()
def orthogonalise(
    stack: Stack,
    how: Orthogonalise,
    *,
    target: Target = "auto",
    strength: float = 1.0,
    gamma: float = 10.0,
    normalise: bool = True,
    steps: int = 200,
    tolerance: float = 1e-6,
) -> tuple[Stack, dict[str, Tensor]]:
    """Lower the overlap of the adapters' output spaces (B) and input spaces (A).

    ``<D_i, D_j> = tr(B_i^T B_j · A_j A_i^T)``, so either side alone suffices to make updates
    orthogonal.

    Args:
        stack: The updates.
        how: The solver, as in ``orthogonalise_stack``; or ``adam``, on the factors themselves.
        target: Which side. ``auto``: both, but only B where the A_i are one frame that all share
            (mean principal cosine above 0.9: adapters trained from one start), and vice versa;
            both where both are shared.
        strength: t of lowdin.
        gamma: γ of the other solvers.
        normalise: Whether γ is in units of the rows' mean square.
        steps: Most steps.
        tolerance: Where gd and lbfgs stop.

    Returns:
        The stack, and per side the overlap before and after and the drift [...].
    """
    sides = {"B": stack.left, "A": stack.right}
    whitened: dict[str, Whitened] = {}
    if how != "none" and (how == "lowdin" or target == "auto") and len(stack.ranks) > 1:
        whitened = {name: whitened_stack(side.gram, stack.ranks) for name, side in sides.items()}
    chosen = _chosen(sides, whitened, stack.ranks, target)
    facts: dict[str, Tensor] = {}
    for name, before in [*sides.items()]:
        after, drift = before, before.gram.new_zeros(before.gram.shape[:-2])
        if bool(chosen[name].any()) and how == "adam":
            after, drift = _by_adam(before, stack.ranks, gamma, normalise, steps)
        elif bool(chosen[name].any()) and how != "none" and how != "adam":
            found = orthogonalise_stack(
                before.gram, stack.ranks, how,
                strength=strength, gamma=gamma, normalise=normalise, steps=steps,
                tolerance=tolerance, null=_NULL[before.rows.dtype], whitened=whitened.get(name),
            )  # fmt: skip
            after = Side(before.rows, found.C @ before.transform, found.gram)
            drift = found.drift
        sides[name] = after = _where(chosen[name], after, before)
        facts[f"overlap_{name}_before"] = was = stack_overlap(before.gram, stack.ranks)
        facts[f"overlap_{name}_after"] = (
            was if after is before else stack_overlap(after.gram, stack.ranks)
        )
        facts[f"drift_{name}"] = drift * chosen[name]
    return replace(stack, left=sides["B"], right=sides["A"]), facts


def per_row(values: Tensor, ranks: Sequence[int], dim: int = -1) -> Tensor:
    """Repeat one entry per adapter for each of its rows, N -> R along one axis."""
    return values.index_select(dim, block_owners(ranks, values.device))


def _chosen(
    sides: Mapping[str, Side],
    whitened: Mapping[str, Whitened],
    ranks: Sequence[int],
    target: Target,
) -> dict[str, Tensor]:
    """Return for each side where it is made orthogonal [...]."""
    G = sides["A"].gram
    every = torch.ones(G.shape[:-2], dtype=torch.bool, device=G.device)
    if target != "auto" or not whitened:
        return {name: every & (target in (name, "both", "auto")) for name in sides}
    shared = {
        name: mean_principal_cosine(W, ranks, above=_SHARED) > _SHARED
        for name, W in whitened.items()
    }
    both = shared["A"] & shared["B"]
    return {name: ~shared[name] | both for name in sides}


def _by_adam(
    side: Side, ranks: Sequence[int], gamma: float, normalise: bool, steps: int
) -> tuple[Side, Tensor]:
    """Return the side with rows that Adam has moved, and how far they have moved."""
    W = side.multiplied()
    squares = _diagonal(side.gram)
    mean = squares.sum(-1) / (squares > 0).sum(-1).clamp(min=1)
    unit = torch.where(mean > 0, mean, 1.0).sqrt() if normalise else torch.ones_like(mean)
    unit = unit[..., None, None].to(W)
    V = adam_stack(W / unit, ranks, gamma, steps=steps) * unit
    moved = torch.linalg.matrix_norm(V - W) / torch.linalg.matrix_norm(W).clamp(min=1e-30)
    return Side.of(V), moved.to(side.gram)


def _where(chosen: Tensor, after: Side, before: Side) -> Side:
    if bool(chosen.all()):
        return after
    at = chosen[..., None, None]
    rows = before.rows if after.rows is before.rows else torch.where(at, after.rows, before.rows)
    transform = torch.where(at, after.transform, before.transform)
    return Side(rows, transform, torch.where(at, after.gram, before.gram))


def _diagonal(G: Tensor) -> Tensor:
    return G.diagonal(dim1=-2, dim2=-1)


def _block_sums(K: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the sum of the entries of every diagonal block [..., N]."""
    owner = _owners(K, ranks)
    return ((K @ owner) * owner).sum(-2)


def _owners(K: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return which adapter a row belongs to, as ones and zeros [R, N]."""
    return per_row(torch.eye(len(ranks), dtype=K.dtype, device=K.device), ranks, 0)


def _require_finite(squares: Tensor, ranks: Sequence[int]) -> None:
    if bool(torch.isfinite(squares).all()):
        return
    bad = (~torch.isfinite(squares)).reshape(-1, squares.shape[-1]).any(0)
    adapters = sorted(set(block_owners(ranks, squares.device)[bad].tolist()))
    raise NumericalError(
        "an adapter's factors are not finite",
        found=f"adapter {', '.join(str(at + 1) for at in adapters)}",
        remedy="The source is damaged or its training diverged; leave it out.",
    )
