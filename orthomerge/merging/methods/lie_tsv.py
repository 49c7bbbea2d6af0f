"""Task singular vectors in the Lie algebra: each expert keeps its planes, made orthogonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["lie_tsv"]


def _global_norms(
    norms: Callable[[], list[float]], *, equalise: float, **_: object
) -> list[float] | None:
    """Measure each model's ‖A_i‖ over all modules, if ``equalise`` asks for it."""
    return norms() if equalise else None


@merge_method(
    "lie-tsv",
    space=Space.ROTATION,
    reference="this project, after arXiv:2412.00081",
    survey=_global_norms,
    laws=("permutation", "scale-equivariance"),
    negative_weights=False,
    divides_by_weight_sum=False,
    dense="tsv-m",
)
def lie_tsv(
    rotations: Sequence[Tensor],
    *,
    weights: Sequence[float],
    survey: Sequence[float] | None = None,
    strength: float = 1.0,
    planes: Annotated[int, Between(0)] = 0,
    equalise: Annotated[float, Between(0, 1)] = 0.0,
) -> Tensor:
    """Keep each expert's largest rotation planes, make all planes orthogonal, add them up.

    A skew block is a sum of planes, ``A_i = Σ_j θ_j (u_j v_j^T - v_j u_j^T)``. Of each expert the k
    planes with the largest θ stay; with P the orthonormal frame nearest to all of them side by
    side, ``A = s P blkdiag(w_i θ_j J) P^T``: skew by construction, so the result is a rotation and
    stays an OFT adapter, and the merged rotations commute.

    Args:
        rotations: A_i, skew blocks ``[blocks, b, b]`` with ``W_i = W_0 · Cayley(A_i)``.
        weights: w_i >= 0, one per model.
        survey: ‖A_i‖ over the whole model, one per model.
        strength: s, multiplies the merged generator.
        planes: k, planes per expert and block; 0 for ⌊b / 2T⌋, at least 1.
        equalise: p: A_i is scaled by (mean ‖A‖ / ‖A_i‖)^p first; helps where norms differ much.

    Returns:
        The merged generator A, of the rotations' shape.

    References:
        Gargiulo et al., Task Singular Vectors, arXiv:2412.00081, carried over to so(b).

    Example:
        >>> import torch
        >>> a = torch.tensor([[[0.0, 0.3], [-0.3, 0.0]]])
        >>> lie_tsv([a], weights=[1.0])[0, 0, 1]
        tensor(0.3000)
    """
    import torch

    from orthomerge.linalg.planes import merge_planes

    scales = list(weights)
    if equalise and survey is not None:
        mean = sum(survey) / len(survey)
        scales = [
            w * (mean / norm) ** equalise if norm else w
            for w, norm in zip(weights, survey, strict=True)
        ]
    merged, _ = merge_planes(
        torch.stack(list(rotations)), scales, planes=planes or None, strength=strength
    )
    return merged.to(rotations[0].dtype)
