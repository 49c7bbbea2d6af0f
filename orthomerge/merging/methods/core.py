"""Run a method of task vectors in the small core space that all LoRA adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orthomerge.merging.nesting import nested_method
from orthomerge.merging.parameters import NestedMethod
from orthomerge.merging.registry import Merged, get_method, merge_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from orthomerge.linalg.factors import Factors
    from orthomerge.merging.draws import Draws

__all__ = ["core"]


@merge_method(
    "core",
    space=Space.FACTORS,
    reference="arXiv:2509.17786",
    laws=("identity", "permutation", "scale-equivariance"),
    lift=lambda parameters: "core",
)
def core(
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    survey: Any = None,
    draws: Draws | None = None,
    op: NestedMethod = "tsv-m",
) -> Merged:
    """Merge in coordinates over frames of both the adapters' outputs and their inputs.

    With U the left singular vectors of ``[B_1 | … | B_N]`` and V the right ones of the A_i stacked,
    both balanced (``B_i^T B_i = A_i A_i^T``): the method ``op`` merges the ``M_i = U^T B_i A_i V``
    [q, p] over a zero base, q and p at most Σ r_i, and ``D = U op(M_1, …, M_N) V^T``. Nothing is
    lost in M_i, and the cost of the op does not depend on the size of the layer.

    Args:
        factors: B_i [o, r_i], A_i [r_i, n], one per model.
        weights: w_i, one per model; a model of weight 0 takes no part, not in U and V either.
        survey: The op's survey of the whole model, for its ``scope: model``.
        draws: The op's random numbers.
        op: What merges the coordinates; null for tsv-m.

    Returns:
        The merged change, of rank Σ r_i or less.

    References:
        Panariello et al., Accurate and efficient low-rank model merging in core space,
        arXiv:2509.17786.

    Example:
        >>> import torch
        >>> from orthomerge.linalg.factors import Factors
        >>> parts = [Factors(torch.eye(2)[:, i:i + 1], torch.eye(2)[i:i + 1]) for i in range(2)]
        >>> core(parts, weights=[1.0, 2.0]).tensor.dense()
        tensor([[1., 0.],
                [0., 2.]])
    """
    from orthomerge.merging.lora.lifting import lifted

    choice = nested_method("op", op or "tsv-m")
    method = get_method(choice.pop("method"))
    given = {"weights": weights, "survey": survey, "draws": draws, **choice}
    return lifted(method, factors, space="core", **given)
