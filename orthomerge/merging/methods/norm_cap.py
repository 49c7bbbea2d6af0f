"""Shrink LoRA adapters that are far louder than the others in a module, then merge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from orthomerge.merging.parameters import NestedLoraMethod
from orthomerge.merging.registry import Merged, merge_method
from orthomerge.merging.spaces import Space
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from orthomerge.linalg.factors import Factors
    from orthomerge.merging.draws import Draws

__all__ = ["norm_cap"]


@merge_method(
    "norm-cap",
    space=Space.FACTORS,
    reference="median + MAD outlier rule",
    laws=("identity", "permutation", "scale-equivariance"),
    whole_changes=True,
)
def norm_cap(
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    draws: Draws | None = None,
    op: NestedLoraMethod = "task-arithmetic",
    deviations: Annotated[float, Between(0)] = 3.0,
) -> Merged:
    """Cap the norm of each change of a module near the models' median, then merge.

    ``D_i <- D_i · min(1, (m + c · d) / ‖D_i‖)`` with m the median of the norms ``‖D_i‖`` of this
    module over the models and d the median of ``| ‖D_i‖ - m |``. Of two models neither is capped
    while c ≥ 1; of three, one that is far from two similar ones.

    Args:
        factors: B_i [o, r_i], A_i [r_i, n], one per model.
        weights: w_i, one per model; norms are without them. Models of weight 0, and changes that
            are zero, do not count for the medians.
        draws: The op's random numbers.
        op: What merges the capped changes; null for task-arithmetic.
        deviations: c, how many median deviations above the median a norm may lie.

    Returns:
        What the op makes of them, the cap and how many models it shrank.

    Example:
        >>> import torch
        >>> from orthomerge.linalg.factors import Factors
        >>> loud = [Factors(torch.eye(1), torch.tensor([[norm]])) for norm in (1.0, 1.0, 100.0)]
        >>> norm_cap(loud, weights=[1.0, 1.0, 1.0]).tensor.dense()
        tensor([[3.]])
    """
    import numpy as np

    from orthomerge.merging.lora.lifting import run_nested_factors

    norms = [float(factor.norm()) for factor in factors]
    counted = [norm for norm, weight in zip(norms, weights, strict=True) if weight and norm]
    median = float(np.median(counted)) if counted else 0.0
    deviation = float(np.median(np.abs(np.array(counted) - median))) if counted else 0.0
    cap = median + deviations * deviation
    capped = [
        factor.scaled(cap / norm) if norm > cap else factor
        for factor, norm in zip(factors, norms, strict=True)
    ]
    merged = run_nested_factors(op or "task-arithmetic", capped, weights=weights, draws=draws)
    facts: dict[str, Any] = {"cap": cap, "capped": sum(norm > cap for norm in counted)}
    return Merged(merged, facts)
