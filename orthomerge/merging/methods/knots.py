"""Run a method of task vectors in the coordinates of a frame that all LoRA adapters share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from orthomerge.merging.nesting import nested_method
from orthomerge.merging.parameters import NestedMethod
from orthomerge.merging.registry import Merged, get_method, merge_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from orthomerge.linalg.factors import Factors
    from orthomerge.merging.draws import Draws

__all__ = ["knots"]


def _lift(parameters: Mapping[str, Any]) -> str:
    return "knots" if parameters["concatenate"] == "columns" else "knots-rows"


@merge_method(
    "knots",
    space=Space.FACTORS,
    reference="arXiv:2410.19735",
    laws=("permutation", "scale-equivariance"),
    lift=_lift,
)
def knots(
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    survey: Any = None,
    draws: Draws | None = None,
    op: NestedMethod = "ties",
    concatenate: Literal["columns", "rows"] = "columns",
) -> Merged:
    """Merge in coordinates over the adapters' joint singular vectors.

    ``[D_1 | … | D_N] = U S [V_1 | … | V_N]^T`` with ``D_i = B_i A_i``; the method ``op`` merges the
    ``Z_i = S V_i^T`` [q, n] over a zero base, and ``D = U op(Z_1, …, Z_N)``. Directions below 1e-6
    of the largest singular value are left out. A linear op gives what it gives without this.

    Args:
        factors: B_i [o, r_i], A_i [r_i, n], one per model.
        weights: w_i, one per model; a model of weight 0 takes no part, not in U either.
        survey: The op's survey of the whole model, for its ``scope: model``.
        draws: The op's random numbers.
        op: What merges the coordinates; null for ties.
        concatenate: What the joint matrix is made of: the columns, so that U spans all outputs in
            use, or the rows: then the transposed ``D_i^T`` are merged, in a frame of the inputs.

    Returns:
        The merged change, of rank Σ r_i or less.

    References:
        Stoica et al., Model merging with SVD to tie the Knots, arXiv:2410.19735.

    Example:
        >>> import torch
        >>> from orthomerge.linalg.factors import Factors
        >>> parts = [Factors(torch.eye(2)[:, i:i + 1], torch.eye(2)[i:i + 1]) for i in range(2)]
        >>> knots(parts, weights=[1.0, 1.0], op="task-arithmetic").tensor.dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    from orthomerge.merging.lora.lifting import lifted

    choice = nested_method("op", op or "ties")
    return lifted(
        get_method(choice.pop("method")),
        factors,
        weights=weights,
        space="knots" if concatenate == "columns" else "knots-rows",
        survey=survey,
        draws=draws,
        **choice,
    )
