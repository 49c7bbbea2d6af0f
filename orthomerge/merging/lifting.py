"""Run methods of task vectors on low-rank factors, in coordinates of a frame the models share.

The frames span every model's change, so nothing is lost, and no dense matrix is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from orthomerge.errors import RecipeError
from orthomerge.linalg.factors import Factors, balanced
from orthomerge.linalg.precision import full_precision
from orthomerge.merging.nesting import run_nested
from orthomerge.merging.registry import Merged, MergeMethod, get_method

__all__ = ["Coordinates", "Lift", "coordinates", "lifted", "merge_factors", "run_nested_factors"]

Lift = Literal["knots", "core"]

_NEGLIGIBLE = 1e-6  # relative to the largest singular value: directions nobody uses


@dataclass(frozen=True)
class Coordinates:
    """The models' changes of one module in a common frame, ``D_i = left Z_i right``.

    Attributes:
        left: Orthonormal columns [o, q].
        items: Z_i, one per model: [q, n] (KnOTS) or [q, p] (core).
        right: Orthonormal rows [p, n]; None for the identity.
    """

    left: Tensor
    items: list[Tensor]
    right: Tensor | None

    def back(self, Z: Tensor) -> Factors:
        """Return the change that has coordinates Z, of rank q or less."""
        left, Z = self.left.to(Z), Z
        return Factors(left, Z) if self.right is None else Factors(left @ Z, self.right.to(Z))


@full_precision()
def coordinates(factors: Sequence[Factors], space: Lift) -> Coordinates:
    """Return the models' changes in a frame that spans all of them.

    ``knots``: with ``[D_1 | … | D_N] = U S [V_1 | … | V_N]^T``, the left frame is U and
    ``Z_i = U^T D_i = S V_i^T`` [q, n]. ``core``: U from ``[B_1 | … | B_N]``, V from the stacked
    ``A_i``, both of the balanced factors, and ``Z_i = U^T D_i V`` [q, p].

    Args:
        factors: B_i [o, r_i], A_i [r_i, n] of one module.
        space: Which coordinates.

    Returns:
        The coordinates, in fp64; q, p ≤ Σ r_i.

    References:
        KnOTS, arXiv:2410.19735; core space, arXiv:2509.17786.
    """
    lifted = [factor.to(torch.float64) for factor in factors]
    if space == "core":
        even = [balanced(factor) for factor in lifted]
        left = _frame(torch.cat([factor.B for factor in even], dim=-1))
        right = _frame(torch.cat([factor.A for factor in even], dim=-2).mT).mT
        items = [(left.mT @ factor.B) @ (factor.A @ right.mT) for factor in even]
        return Coordinates(left, items, right)
    Q = torch.linalg.qr(torch.cat([factor.B for factor in lifted], dim=-1)).Q
    inner = [Q.mT @ factor.B for factor in lifted]  # D_i = Q inner_i A_i
    gram = sum(
        (K @ (factor.A @ factor.A.mT) @ K.mT for K, factor in zip(inner, lifted, strict=True)),
        torch.zeros(Q.shape[-1], Q.shape[-1], dtype=Q.dtype, device=Q.device),
    )
    E = _directions(gram)
    items = [(E.mT @ K) @ factor.A for K, factor in zip(inner, lifted, strict=True)]
    return Coordinates(Q @ E, items, None)


def lifted(
    method: MergeMethod,
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    space: Lift = "knots",
    survey: Any = None,
    draws: Any = None,
    **parameters: Any,
) -> Merged:
    """Merge one module with a method of task vectors, run on coordinates over a zero base.

    Raises:
        RecipeError: The method's update depends on the base.
    """
    if "additive" not in method.laws:
        raise RecipeError(
            f"{method.name} needs the base's weights, so it cannot merge low-rank factors alone",
            remedy="Pass --base (in a recipe: base), to get a full checkpoint.",
        )
    common = coordinates(factors, space)
    dtype = factors[0].B.dtype
    items = [item.to(dtype) for item in common.items]
    merged = run_nested(
        {"method": method.name, **parameters},
        torch.zeros_like(items[0]),
        items,
        weights=weights,
        role="linear",
        survey=survey,
        draws=draws,
    )
    return Merged(common.back(merged))


def merge_factors(
    method: MergeMethod,
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    survey: Any = None,
    draws: Any = None,
    **parameters: Any,
) -> Merged:
    """Merge one module's factors by a method's own face for them, else in KnOTS coordinates."""
    given = {"weights": weights, "survey": survey, "draws": draws, **parameters}
    if method.factors is not None:
        return method.call_on_factors(factors, **given)
    return lifted(method, factors, **given)


def run_nested_factors(
    choice: Mapping[str, Any],
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    survey: Any = None,
    draws: Any = None,
) -> Factors:
    """Merge factors with the method a nested parameter names; a batch is taken item by item.

    Args:
        choice: From ``nested_method``.
        factors: One per model, of one module or with one leading axis of modules.
        weights: One per model.
        survey: The method's survey of the whole model; None to look at these factors alone.
        draws: Random numbers.
    """
    method = get_method(choice["method"])
    given = {key: item for key, item in choice.items() if key != "method"}
    arguments = {"weights": weights, "survey": survey, "draws": draws, **given}
    if factors[0].B.ndim == 2 or method.batched:
        return _product(merge_factors(method, factors, **arguments))
    parts = [
        _product(merge_factors(method, [Factors(f.B[at], f.A[at]) for f in factors], **arguments))
        for at in range(len(factors[0].B))
    ]
    rank = max(part.rank for part in parts)
    padded = [part.padded(rank) for part in parts]
    return Factors(torch.stack([p.B for p in padded]), torch.stack([p.A for p in padded]))


def _product(merged: Merged) -> Factors:
    product: Factors = merged.tensor
    return product


def _frame(stack: Tensor) -> Tensor:
    """Return the left singular vectors of a tall stack that carry weight."""
    U, s, _ = torch.linalg.svd(stack, full_matrices=False)
    frame: Tensor = U[:, s > _NEGLIGIBLE * s[:1]]
    return frame


def _directions(gram: Tensor) -> Tensor:
    """Return the eigenvectors of a Gram matrix, largest first, without the negligible ones."""
    values, vectors = torch.linalg.eigh(gram)
    keep = values > _NEGLIGIBLE**2 * values[-1:].clamp(min=0)
    directions: Tensor = vectors[:, keep].flip(-1)
    return directions
