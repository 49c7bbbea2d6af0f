"""Turn down output directions that many LoRA adapters share, then merge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from orthomerge.merging.parameters import NestedLoraMethod
from orthomerge.merging.registry import Merged, merge_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from orthomerge.linalg.factors import Factors
    from orthomerge.merging.draws import Draws

__all__ = ["pico"]


@merge_method(
    "pico",
    space=Space.FACTORS,
    reference="arXiv:2604.16826",
    laws=("permutation", "scale-equivariance"),
)
def pico(
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    draws: Draws | None = None,
    op: NestedLoraMethod = "task-arithmetic",
    gauge: Literal["balanced", "stored"] = "balanced",
) -> Merged:
    """Damp shared directions of the B factors, merge, restore the size of the result.

    ``[B_1 | … | B_N] = U diag(σ) V^T``, ``s_k = σ_k² / Σ σ²``, ``a_k = 1 / (1 + (N - 1) s_k)``:
    ``B_i <- (I + U diag(a - 1) U^T) B_i``, so a direction that holds everything is divided by N and
    one that holds nothing stays. Then ``D = γ op(B_1 A_1, …)`` with γ such that ‖D‖ is the norm of
    what the op makes of the undamped factors: only directions are changed, never the strength.

    Args:
        factors: B_i [o, r_i], A_i [r_i, n], one per model; the scale α/r is part of B_i.
        weights: w_i, one per model. Models of weight 0, and changes that are zero, do not count: N
            is the number of the others.
        draws: The op's random numbers.
        op: What merges the damped factors; null for task-arithmetic.
        gauge: Share each change's singular values evenly over B and A first, so that only the
            changes themselves matter, or take the factors as they are stored, as the paper does.

    Returns:
        The merged change and what was done to it.

    References:
        Tang and Yang, Crowded in B-space, arXiv:2604.16826. To which norm the paper restores the
        result was not available; see the method's page.

    Example:
        >>> import torch
        >>> from orthomerge.linalg.factors import Factors
        >>> parts = [Factors(torch.tensor([[1.0], [0.0]]), torch.eye(2)[i:i + 1]) for i in range(2)]
        >>> pico(parts, weights=[1.0, 1.0]).tensor.dense()  # all is shared: nothing to choose
        tensor([[1., 1.],
                [0., 0.]])
    """
    from orthomerge.linalg.factors import balanced
    from orthomerge.merging.lora.calibration import damped_outputs
    from orthomerge.merging.lora.lifting import run_nested_factors

    if gauge == "balanced":
        factors = [balanced(factor) if factor.rank else factor for factor in factors]
    damped, least = damped_outputs(factors, weights)
    choice = op or "task-arithmetic"
    merged = run_nested_factors(choice, damped, weights=weights, draws=draws)
    undamped = run_nested_factors(choice, factors, weights=weights, draws=draws)
    norm, wanted = (_resolved_norm(product) for product in (merged, undamped))
    gamma = wanted / norm if norm and wanted else 1.0
    return Merged(merged.scaled(gamma), {"least_factor": least, "rescaled": gamma})


def _resolved_norm(product: Factors) -> float:
    """Return ‖B A‖, or 0 where it is so small beside ‖B‖ ‖A‖ that it is rounding noise."""
    norm = float(product.norm())
    largest = float(product.B.double().norm() * product.A.double().norm())
    return norm if norm > 1e-6 * largest else 0.0
