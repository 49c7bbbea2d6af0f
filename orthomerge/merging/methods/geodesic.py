"""The base-free merge: meet half-way along the rotation between the models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from orthomerge.merging.registry import Merged, merge_method
from orthomerge.merging.roles import rotated_roles, unfit_block
from orthomerge.merging.spaces import Space
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["geodesic"]


def _workspace(shape: tuple[int, ...], models: int) -> int:
    """Return the float32 elements held: some fifteen n x n matrices per model, all in fp64."""
    rows, columns = shape[0], math.prod(shape[1:])
    spanned = min(columns, models * rows)
    return 2 * (15 * models * spanned**2 + 2 * (models + 1) * rows * columns)


@merge_method(
    "geodesic",
    space=Space.WEIGHT,
    reference="this project, after Gower 1975, doi:10.1007/BF02291478",
    laws=("identity", "idempotent", "permutation", "scale-equivariance"),
    negative_weights=False,
    divides_by_weight_sum=True,
    whole=True,
    workspace=_workspace,
    unfit=unfit_block,
)
def geodesic(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[float],
    role: str = "linear",
    gate: Literal["auto", "off"] = "auto",
    margin: Annotated[float, Between(0, 1)] = 0.1,
    anchor: Annotated[float, Between(0, open_low=True)] = 1e-3,
    block: Annotated[int, Between(0)] = 0,
    include_embeddings: bool = True,
    rotate_conv: bool = False,
) -> Merged:
    """Average the models after turning each by its share of the rotation between them.

    ``W = Σ w_i W_i R_i^T`` with rotations R_i whose weighted mean is the identity and under which
    the models agree best, ``W_i ≈ C R_i`` (generalised Procrustes). Two models with W_2 = W_1 R
    give W_1 R^{w_2}, a point of the geodesic; models without a rotation between them give their
    average. Rotated models keep their rows' lengths, which the plain average shrinks. The gate
    averages a layer plainly unless some pair is closer after the best rotation than noise would be:
    ``‖W_i R - W_j‖ < (1 - margin) b ‖W_i - W_j‖``, b = √(1 - n/2o) or, for o < n, √(o/2n).

    Args:
        tensors: W_i, one per model.
        weights: w_i >= 0, divided by their sum.
        role: What the tensor is in the model: only weight matrices are rotated.
        gate: auto rotates a layer only where its models differ by a rotation; off always does.
        margin: How far below the level of noise the distance must be.
        anchor: Pulls rotations to the identity where the weights do not determine them.
        block: Rotate blocks of this many inputs by themselves; 0 rotates all together.
        include_embeddings: Rotate embeddings and output heads, too.
        rotate_conv: Rotate convolution kernels, seen as [out, in · kh · kw].

    Returns:
        The merged weight, and how far each model was turned.

    Example:
        >>> import torch
        >>> turned = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> geodesic([torch.eye(2), turned], weights=[1.0, 1.0], anchor=1e-9).tensor.abs()
        tensor([[0.7071, 0.7071],
                [0.7071, 0.7071]])
    """
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    if role not in rotated_roles(include_embeddings=include_embeddings, rotate_conv=rotate_conv):
        return Merged(_average(tensors, shares))
    gated = margin if gate == "auto" else None
    settings = {"anchor": anchor, "block": block or None}
    if role == "stack":
        import torch

        parts = [
            _mean(matrices, shares, gated, settings) for matrices in zip(*tensors, strict=True)
        ]
        return Merged(torch.stack([m for m, _ in parts]), {"stack": [f for _, f in parts]})
    merged, facts = _mean([t.reshape(len(t), -1) for t in tensors], shares, gated, settings)
    return Merged(merged.reshape(tensors[0].shape), facts)


def _average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    merged = tensors[0] * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        merged.add_(tensor, alpha=share)
    return merged


def _mean(
    matrices: Sequence[Tensor],
    shares: Sequence[float],
    margin: float | None,
    settings: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Return the mean of matrices, turned only if they differ by a rotation; None always turns."""
    import dataclasses

    from orthomerge.merging.steps.rotating import pairwise_rotational, spanned_mean

    facts: dict[str, Any] = {"rotated": True}
    if margin is not None:
        rotational, fraction = pairwise_rotational(matrices, margin, settings)
        facts = {"rotated": rotational, "residual_over_noise": fraction}
        if not rotational:
            return _average(matrices, shares), facts
    merged, report = spanned_mean(matrices, shares, settings)
    return merged.to(matrices[0].dtype), {**facts, **dataclasses.asdict(report)}
