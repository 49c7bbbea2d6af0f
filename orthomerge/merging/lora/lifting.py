"""Run methods of task vectors on low-rank factors, in coordinates of a frame the models share.

The frames span every model's change, so nothing is lost, and no dense matrix is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orthomerge.errors import RecipeError
from orthomerge.linalg.factors import Factors, balanced, stacked
from orthomerge.linalg.precision import full_precision
from orthomerge.merging.lora.frames import Lift
from orthomerge.merging.lora.strengths import update_strength
from orthomerge.merging.nesting import nested_method, run_nested
from orthomerge.merging.registry import Merged, MergeMethod, get_method
from orthomerge.merging.spaces import Space

__all__ = [
    "Coordinates",
    "coordinates",
    "lifted",
    "lifted_coordinates",
    "merge_factors",
    "merge_vectors",
    "run_nested_factors",
]

_NEGLIGIBLE = 1e-6  # relative to the largest singular value: directions nobody uses
# Of a coordinate, relative to a model's largest: well below what the factors' own rounding does.
_NOISE = {torch.float32: 2e-9, torch.float64: 1e-14}


@dataclass(frozen=True)
class Coordinates:
    """The models' changes of one module in a common frame, ``D_i = left Z_i right``.

    Attributes:
        left: Orthonormal columns [o, q].
        items: Z_i, one per model: [q, n] (KnOTS) or [q, p] (core).
        right: Orthonormal rows [p, n]; None for the identity.
        turned: Whether all this is of the transposed changes.
    """

    left: Tensor
    items: list[Tensor]
    right: Tensor | None
    turned: bool = False

    def back(self, Z: Tensor) -> Factors:
        """Return the change that has coordinates Z, of rank q or less."""
        left = self.left.to(Z)
        right = None if self.right is None else self.right.to(Z)
        product = Factors(left, Z) if right is None else Factors(left @ Z, right)
        return product.turned() if self.turned else product


@full_precision()
def coordinates(factors: Sequence[Factors], space: Lift) -> Coordinates:
    """Return the models' changes in a frame that spans all of them.

    ``knots``: with ``[D_1 | … | D_N] = U S [V_1 | … | V_N]^T``, the left frame is U and
    ``Z_i = U^T D_i = S V_i^T`` [q, n]. ``knots-rows``: that of the ``D_i^T``. ``core``: U from
    ``[B_1 | … | B_N]``, V from the stacked ``A_i``, both of the balanced factors, and
    ``Z_i = U^T D_i V`` [q, p].

    Args:
        factors: B_i [o, r_i], A_i [r_i, n] of one module.
        space: Which coordinates.

    Returns:
        The coordinates, in fp64; q, p ≤ Σ r_i.

    References:
        KnOTS, arXiv:2410.19735; core space, arXiv:2509.17786.
    """
    if space == "knots-rows":
        across = coordinates([factor.turned() for factor in factors], "knots")
        return replace(across, turned=True)
    lifted = [factor.to(torch.float64) for factor in factors]
    if space == "core":
        even = [balanced(factor) for factor in lifted]
        left = _frame(torch.cat([factor.B for factor in even], dim=-1))
        right = _frame(torch.cat([factor.A for factor in even], dim=-2).mT).mT
        items = [(left.mT @ factor.B) @ (factor.A @ right.mT) for factor in even]
        return Coordinates(left, items, right)
    Q, R = torch.linalg.qr(torch.cat([factor.B for factor in lifted], dim=-1))
    inner = torch.split(R, [factor.rank for factor in lifted], dim=-1)  # D_i = Q inner_i A_i
    gram = sum(
        (K @ (factor.A @ factor.A.mT) @ K.mT for K, factor in zip(inner, lifted, strict=True)),
        torch.zeros(Q.shape[-1], Q.shape[-1], dtype=Q.dtype, device=Q.device),
    )
    E = _directions(gram)
    items = [(E.mT @ K) @ factor.A for K, factor in zip(inner, lifted, strict=True)]
    return Coordinates(Q @ E, items, None)


def lifted_coordinates(
    factors: Sequence[Factors], weights: Sequence[float], space: Lift
) -> Coordinates:
    """Return what a method of task vectors sees of one module, in the factors' dtype.

    A model of weight 0 takes no part in the frame: it is a change of rank 0. What rounding leaves
    of a coordinate that is zero is set to zero, else methods that count what is not zero count it.
    """
    pairs = zip(factors, weights, strict=True)
    common = coordinates([f if w else Factors(f.B[:, :0], f.A[:0]) for f, w in pairs], space)
    dtype = factors[0].B.dtype
    return replace(common, items=[_without_noise(Z, dtype).to(dtype) for Z in common.items])


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
    common = lifted_coordinates(factors, weights, space)
    zero = torch.zeros_like(common.items[0])
    if not zero.numel():  # no model changes this module
        return Merged(common.back(zero))
    merged = run_nested(
        {"method": method.name, **parameters},
        zero,
        common.items,
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
    folded: Sequence[float] | None = None,
    **parameters: Any,
) -> Merged:
    """Merge one module's factors by a method's own face for them, else in KnOTS coordinates.

    Args:
        method: The method.
        factors: One per model.
        weights: One per model.
        survey: The method's survey of the whole model.
        draws: Random numbers.
        folded: What each B_i was multiplied by, for a method that asks.
        **parameters: The method's parameters, all of them.
    """
    given = {"weights": weights, "survey": survey, "draws": draws, **parameters}
    if method.factors is not None:
        return method.call_on_factors(factors, folded=folded, **given)
    return lifted(method, factors, **given)


def merge_vectors(
    method: MergeMethod,
    vectors: Sequence[Tensor],
    *,
    weights: Sequence[float],
    draws: Any = None,
    measured: float | None = None,
    **parameters: Any,
) -> Tensor:
    """Merge vectors that go along with factors, biases, as the method merges a full model's.

    Methods of low-rank factors know no vectors: theirs are ``c Σ w_i v_i``, see
    ``update_strength``.

    Args:
        method: The method that merged the factors.
        vectors: v_i, one per model.
        weights: One per model.
        draws: Random numbers.
        measured: The method's λ, where that was left to it.
        **parameters: The method's.
    """
    zero = torch.zeros_like(vectors[0])
    if method.space is Space.FACTORS:
        strength = update_strength(method, parameters, weights, measured=measured)
        assert strength is not None  # the plan has refused what leaves it open
        return strength * sum((w * v for w, v in zip(weights, vectors, strict=True)), zero)
    if method.space is Space.WEIGHT:
        merged: Tensor = method.call(vectors, weights=weights, **parameters).tensor
        return merged
    choice = {"method": method.name, **parameters}
    return run_nested(choice, zero, vectors, weights=weights, role="other", draws=draws)


def run_nested_factors(
    choice: Mapping[str, Any] | str,
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    draws: Any = None,
) -> Factors:
    """Merge factors with the method a nested parameter names; a batch is taken item by item.

    Args:
        choice: The nested parameter's value; what it leaves open has its default.
        factors: One per model, of one module or with one leading axis of modules.
        weights: One per model.
        draws: Random numbers.
    """
    choice = nested_method("op", choice, Space.FACTORS)
    method = get_method(choice["method"])
    given = {key: item for key, item in choice.items() if key != "method"}
    arguments = {"weights": weights, "draws": draws, **given}
    if factors[0].B.ndim == 2 or method.batched:
        return _product(merge_factors(method, factors, **arguments))
    parts = [
        _product(merge_factors(method, [factor.item(at) for factor in factors], **arguments))
        for at in range(len(factors[0].B))
    ]
    return stacked(parts)


def _without_noise(Z: Tensor, dtype: torch.dtype) -> Tensor:
    if not Z.numel():
        return Z
    magnitudes = Z.abs()
    return Z.masked_fill(magnitudes <= _NOISE[dtype] * magnitudes.amax(), 0.0)


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
