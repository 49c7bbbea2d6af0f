"""Average the two factors of LoRA adapters by themselves, as PEFT's "linear" does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthomerge.errors import RecipeError
from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from orthomerge.linalg.factors import Factors

__all__ = ["peft_linear"]


def _unfit(ranks: Sequence[int]) -> str | None:
    """Return why factors of these ranks cannot be added, or None; 0 is a model without a change."""
    found = sorted({rank for rank in ranks if rank})
    if len(found) < 2:
        return None
    return f"peft-linear adds factors of one rank only, these have {', '.join(map(str, found))}"


@merge_method(
    "peft-linear",
    space=Space.FACTORS,
    reference='PEFT, add_weighted_adapter(combination_type="linear")',
    laws=("identity", "permutation", "scale-equivariance"),
    output_rank=max,
    unfit_ranks=_unfit,
    caution="peft-linear is PEFT's formula for comparison only: it multiplies each adapter's B by "
    "every other adapter's A, which is no sum of the adapters; task-arithmetic is",
)
def peft_linear(
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    folded: Sequence[float] | None = None,
) -> Factors:
    """Add the A factors and the B factors separately, as PEFT does; not a sum of the changes.

    With stored factors and scales, ``D_i = s_i B_i A_i``: ``A = Σ sgn(w_i s_i) √|w_i s_i| A_i``,
    ``B = Σ √|w_i s_i| B_i``, so ``D = B A`` holds N (N - 1) products of one adapter's B with
    another's A that belong to no adapter. For comparison with PEFT; use task-arithmetic instead.

    Args:
        factors: s_i B_i [o, r], A_i [r, n], one per model, of one rank.
        weights: w_i, one per model.
        folded: s_i: what B_i was multiplied by. Without them, inside another method, the scales
            count as equal.

    Returns:
        B and A, of rank r.

    Raises:
        RecipeError: The ranks differ.

    Example:
        >>> import torch
        >>> from orthomerge.linalg.factors import Factors
        >>> entries = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[1.0]], [[2.0]]])
        >>> parts = [Factors(B, A) for B, A in zip(*entries)]
        >>> peft_linear(parts, weights=[1.0, 1.0]).dense()  # the sum of 1 and 6 is 7
        tensor([[12.]])
    """
    from orthomerge.linalg.factors import Factors

    problem = _unfit([factor.rank for factor in factors])
    if problem:
        raise RecipeError(problem, remedy="Use task-arithmetic, which takes any ranks.")
    known = folded or [1.0] * len(factors)
    entries = [e for e in zip(factors, weights, known, strict=True) if e[0].rank]
    if not entries:
        return factors[0]
    first = entries[0][0]
    B, A = first.B.new_zeros(first.B.shape), first.A.new_zeros(first.A.shape)
    for factor, weight, scale in entries:
        if scale:  # a scale of zero is a change of zero, and its B is zero here
            size = math.sqrt(abs(weight * scale))
            B = B + factor.B * (size / scale)  # the scale is in the given B
            A = A + factor.A * math.copysign(size, weight * scale)
    return Factors(B, A)
