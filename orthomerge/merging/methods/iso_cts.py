"""Directions that the tasks share and directions of their own, all with the same strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.matrices import merge_matrices
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["iso_cts"]


def _workspace(shape: tuple[int, ...], models: int) -> int:
    """Return the float32 elements held: fp64 sum and residual, Gram matrix, vectors, frames."""
    rows, columns = shape[0], math.prod(shape[1:])
    short = min(rows, columns)
    frames = (2 + 1 / max(1, models)) * (rows + columns) * short
    return int(2 * (5 * short**2 + 4 * rows * columns + frames))


@merge_method(
    "iso-cts",
    space=Space.DELTA,
    reference="arXiv:2502.04959",
    laws=("permutation", "scale-equivariance", "additive"),
    whole=True,
    workspace=_workspace,
)
def iso_cts(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    role: str = "linear",
    common: Annotated[float, Between(0, 1)] = 0.8,
    scale: float = 1.0,
) -> Tensor:
    """Join the leading directions of the sum with each task's own, all at their mean strength.

    For matrices, q the rank of ``Σ w_i D_i`` and T tasks: s = ⌊(1 - common) q / T⌋ directions per
    task and the other k = q - T s from the sum. ``U_c S_c V_c^T`` are its k leading singular
    triples, ``U_i S_i V_i^T`` the s leading ones of ``(I - U_c U_c^T) w_i D_i``. Then
    ``W = W_0 + λ σ polar([U_c U_1 … U_T]) polar([V_c V_1 … V_T])^T``, σ the mean of all the S.
    Other tensors: ``W_0 + λ Σ w_i D_i / T``; convolutions and stacks as in tsv-m.

    Args:
        base: W_0.
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i, one per model; a model of weight 0 takes no part.
        role: What the tensor is in the model.
        common: Fraction of the directions taken from the sum; 1 gives iso-c.
        scale: λ, multiplies the whole update.

    Returns:
        The merged weight.

    References:
        Marczak et al., No Task Left Behind, arXiv:2502.04959: Iso-CTS.

    Example:
        >>> import torch
        >>> deltas = [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]
        >>> iso_cts(torch.zeros(2, 2), deltas, weights=[1.0, 1.0])
        tensor([[2., 0.],
                [0., 2.]])
    """
    update = partial(_update, common=common)
    return merge_matrices(base, deltas, weights, update, role=role, scale=scale)


def _update(deltas: Sequence[Tensor], weights: Sequence[float], *, common: float) -> Tensor:
    """Return ``σ U V^T`` in float64; the deltas are matrices, all of which take part."""
    from orthomerge.merging.steps.isotropic import common_directions, flat_spectrum, own_directions

    shared = common_directions(deltas, weights)
    tasks = [w * d.double() for w, d in zip(weights, deltas, strict=True) if bool(d.any())]
    own = math.floor((1 - common) * len(shared.S) / max(1, len(tasks)) + 1e-9)
    shared = shared.leading(len(shared.S) - own * len(tasks))
    parts = [shared, *(own_directions(task, shared, own) for task in tasks if own)]
    return flat_spectrum(parts, deltas[0])
