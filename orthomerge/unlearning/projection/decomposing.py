"""Split a gradient into the part that moves protected losses and the part that does not.

Pure functions on lists of tensors, one per parameter; windows and optimizers are elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from orthomerge.errors import NumericalError, UnknownNameError
from orthomerge.linalg.precision import full_precision
from orthomerge.unlearning.projection.products import combine, products
from orthomerge.unlearning.projection.solving import (
    grouped,
    signed_coefficients,
    solve_groups,
)

__all__ = ["Decomposition", "decompose"]

Tensors = Sequence[torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A gradient as a sum of two parts.

    Attributes:
        normal: What is left: to first order it does not move (hard) or raise (cone) a row's loss.
        tangent: What was removed, ``G lam``.
        coefficients: lam, [k] for one group, else [groups, k], in float64.
    """

    normal: list[torch.Tensor]
    tangent: list[torch.Tensor]
    coefficients: torch.Tensor


@full_precision()
def decompose(
    g: Tensors,
    rows: Sequence[Tensors],
    P: Sequence[torch.Tensor] | None = None,
    *,
    rtol: float = 1e-7,
    mode: Literal["hard", "cone", "sign"] = "hard",
    granularity: Literal["global", "per-tensor"] = "global",
    retain: Tensors | None = None,
    floor: float = 0.0,
) -> Decomposition:
    """Split g into ``normal + tangent`` with ``tangent = G lam`` in the span of the rows.

    With K = G^T P G and b = G^T P g: ``lam = K^+ b`` (hard), so that G^T P normal = 0; or the
    nearest normal part with G^T P normal >= 0 (cone), which a descent step along it turns into
    losses that do not rise. P = diag(p) is the optimizer's preconditioner; gradients are raw and
    need no square roots of it. For P not given, the optimizer must be plain SGD. A second pass on
    the remainder brings the residual to rounding.

    Args:
        g: The gradient to split, one tensor per parameter; None counts as zero.
        rows: k protected gradients, each like ``g``.
        P: Positive diagonal, one tensor per parameter; the identity if None.
        rtol: Eigenvalue cut-off of the normalised Gram matrix.
        mode: ``"hard"``, ``"cone"``, or ``"sign"`` for comparisons with the sign-aware rule.
        granularity: One set of coefficients, or one per tensor. The latter is stricter: every
            tensor's share of the product vanishes.
        retain: The retain gradient that decides in ``sign``; the first row by default.
        floor: GEM's margin, see ``solve_cone``.

    Returns:
        Both parts in the working dtype (at least float32), and lam.

    Raises:
        NumericalError: Shapes do not fit or a value is not finite.
        UnknownNameError: ``mode`` or ``granularity`` is unknown.

    References:
        arXiv:2511.17100, lemma 3.2.

    >>> parts = decompose([torch.tensor([2.0, 1.0])], [[torch.tensor([1.0, 3.0])]])
    >>> parts.normal[0].tolist(), parts.coefficients.tolist()
    ([1.5, -0.5], [0.5])
    """
    _known(mode, granularity)
    vectors, blocks, scales = _flat(g, rows, P)
    shapes = [_shape(index, [g, *rows]) for index in range(len(g))]
    ids = torch.arange(len(g)) if granularity == "per-tensor" else torch.zeros(len(g)).long()
    decider = None
    if mode == "sign":
        decider = _flat(rows[0] if retain is None else retain, rows, P)[0]
    normal, lam = _split(vectors, blocks, scales, ids, mode, rtol, floor, decider)
    tangent = [v - n for v, n in zip(vectors, normal, strict=True)]
    return Decomposition(
        _shaped(normal, shapes),
        _shaped(tangent, shapes),
        lam if granularity == "per-tensor" else lam[0],
    )


def _split(
    vectors: list[torch.Tensor],
    blocks: list[torch.Tensor],
    scales: list[torch.Tensor | None],
    ids: torch.Tensor,
    mode: Literal["hard", "cone", "sign"],
    rtol: float,
    floor: float,
    decider: list[torch.Tensor] | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return normal parts and coefficients [groups, k], after a second pass on the remainder."""
    K = torch.stack([products(X, X, p).cpu() for X, p in zip(blocks, scales, strict=True)])
    lam = torch.zeros(int(ids.max()) + 1, K.shape[-1], dtype=torch.float64)
    normal = list(vectors)
    for again in (False, True):
        b, norms = _measure(normal, blocks, scales)
        problem = grouped(K, b, norms, ids)
        if mode == "sign":
            if decider is None or again:
                break
            retain = grouped(K, _measure(decider, blocks, scales)[0], norms, ids).b
            step = signed_coefficients(problem, retain, rtol=rtol)
        else:
            margin = 0.0 if again else floor
            step, _ = solve_groups(problem, mode, rtol=rtol, ascent=True, floor=margin)
        lam += step
        normal = [v - combine(X, step[i]) for v, X, i in zip(normal, blocks, ids, strict=True)]
    return normal, lam


def _known(mode: str, granularity: str) -> None:
    for kind, name, known in (
        ("mode", mode, ("hard", "cone", "sign")),
        ("granularity", granularity, ("global", "per-tensor")),
    ):
        if name not in known:
            raise UnknownNameError(kind, name, known)


def _shaped(vectors: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    return [vector.reshape(shape) for vector, shape in zip(vectors, shapes, strict=True)]


def _measure(
    vectors: Sequence[torch.Tensor],
    blocks: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return products with the rows [T, k] and squared norms [T] of the vectors, on the CPU."""
    triples = list(zip(vectors, blocks, scales, strict=True))
    b = torch.stack([products(X, v[None], p)[:, 0].cpu() for v, X, p in triples])
    norms = torch.stack([products(v[None], v[None], p)[0, 0].cpu() for v, _, p in triples])
    return b, norms


def _flat(
    g: Tensors, rows: Sequence[Tensors], P: Sequence[torch.Tensor] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
    """Return flat vectors [n], stacked rows [k, n] and flat scales per parameter."""
    if not rows or not g:
        raise NumericalError(
            "nothing to split, or no row to protect", found=f"{len(g)} tensors, {len(rows)} rows"
        )
    lengths = {len(g), *(len(row) for row in rows), *([len(P)] if P is not None else [])}
    if len(lengths) > 1:
        raise NumericalError(
            "gradient, rows and P have different numbers of tensors", found=sorted(lengths)
        )
    vectors, blocks = [], []
    for index in range(len(g)):
        shape = _shape(index, [g, *rows])
        like = next((t for t in (g[index], *(row[index] for row in rows)) if t is not None), None)
        zero = torch.zeros(shape) if like is None else torch.zeros_like(like)
        parts = [zero if t is None else t for t in (g[index], *(row[index] for row in rows))]
        wide = torch.float32
        for part in parts:
            wide = torch.promote_types(wide, part.dtype)
        stack = torch.stack([part.detach().to(wide).reshape(-1) for part in parts])
        if not bool(torch.isfinite(stack).all()):
            raise NumericalError("a gradient is not finite", tensor=str(index))
        vectors.append(stack[0])
        blocks.append(stack[1:])
    scales: list[torch.Tensor | None] = [None] * len(g)
    if P is not None:
        scales = [p.detach().reshape(-1) for p in P]
    return vectors, blocks, scales


def _shape(index: int, lists: Sequence[Tensors]) -> torch.Size:
    shapes = {item.shape for tensors in lists if (item := tensors[index]) is not None}
    if len(shapes) > 1:
        raise NumericalError(
            "gradients of one parameter differ in shape",
            tensor=str(index),
            found=", ".join(str(tuple(shape)) for shape in sorted(shapes)),
        )
    return shapes.pop() if shapes else torch.Size([0])
