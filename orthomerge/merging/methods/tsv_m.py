"""Task singular vectors, decorrelated and summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthomerge.merging.registry import Merged, merge_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.matrices import merge_matrices

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.linalg.factors import Factors

__all__ = ["tsv_m"]


def workspace(shape: tuple[int, ...], models: int) -> int:
    """Return the float32 elements held: fp64 Gram matrix, vectors, and both frames per model."""
    rows, columns = shape[0], math.prod(shape[1:])
    short = min(rows, columns)
    return 2 * (3 * short**2 + 4 * rows * columns // max(1, models) + 2 * (rows + columns) * short)


def _of_factors(
    factors: Sequence[Factors], *, weights: Sequence[float], scale: float
) -> Merged | Factors:
    """Merge low-rank changes: Löwdin's form of both frames where there is room for all ranks.

    With more ranks than dimensions each is cut to its share, in coordinates, as full changes are.
    """
    from orthomerge.merging.lora.decorrelating import do_merge
    from orthomerge.merging.lora.lifting import lifted
    from orthomerge.merging.lora.presets import PRESETS
    from orthomerge.merging.registry import get_method

    if sum(factor.rank for factor in factors) > min(factors[0].shape):
        return lifted(get_method("tsv-m"), factors, weights=weights, scale=scale)
    robust = {**PRESETS["robust"], "preset": "robust", "op": None, "draws": None}
    return do_merge(factors, weights, {**robust, "target": "both", "scale": scale})


@merge_method(
    "tsv-m",
    space=Space.DELTA,
    reference="arXiv:2412.00081",
    laws=("identity", "permutation", "scale-equivariance", "additive"),
    whole=True,
    workspace=workspace,
    factors=_of_factors,
)
def tsv_m(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    role: str = "linear",
    scale: float = 1.0,
) -> Tensor:
    """Keep each task's leading singular directions, make them orthogonal, add them up.

    For matrices: ``D_i ≈ U_i S_i V_i^T`` with the r = max(1, ⌊min(o, n) / T⌋) largest singular
    values, or with all where the ranks of the D_i add up to min(o, n) or less;
    ``U = polar([U_1 … U_T])``, ``V`` likewise, and ``W = W_0 + λ U blkdiag(w_i S_i) V^T``. Other
    tensors: ``W_0 + λ Σ w_i D_i / T``. Convolution kernels are seen as [out, in · kh · kw], a stack
    of experts' matrices one by one.

    Args:
        base: W_0.
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i, one per model; a model of weight 0 takes no part.
        role: What the tensor is in the model.
        scale: λ, multiplies the whole update.

    Returns:
        The merged weight.

    References:
        Gargiulo et al., Task Singular Vectors, arXiv:2412.00081, §4.2.

    Example:
        >>> import torch
        >>> deltas = [torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]
        >>> tsv_m(torch.zeros(2, 2), deltas, weights=[1.0, 1.0])
        tensor([[2., 0.],
                [0., 1.]])
    """
    return merge_matrices(base, deltas, weights, _update, role=role, scale=scale)


def _update(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``U blkdiag(w_i S_i) V^T`` in float64; the deltas are matrices."""
    import torch

    from orthomerge.linalg.lowrank import orthonormal_frame

    if len(deltas) == 1:  # nothing is cut off and nothing interferes
        return weights[0] * deltas[0].double()
    parts = _directions(deltas)
    S = torch.cat([w * s for w, (_, s, _) in zip(weights, parts, strict=True)])
    if not len(S):
        return torch.zeros_like(deltas[0], dtype=torch.float64)
    U = orthonormal_frame([u for u, _, _ in parts])
    V = orthonormal_frame([v for _, _, v in parts])
    return (U * S) @ V.mT


def _directions(deltas: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each task's singular triples: all if there is room for all, else an equal share."""
    from orthomerge.linalg.lowrank import leading_directions

    room = min(deltas[0].shape)
    share = max(1, room // len(deltas))
    parts = []
    for delta in deltas:
        parts.append(leading_directions(delta, max(share, room + 1)))
        room -= len(parts[-1][1])
    if room >= 0:
        return parts
    return [(U[:, :share].clone(), S[:share], V[:, :share].clone()) for U, S, V in parts]
