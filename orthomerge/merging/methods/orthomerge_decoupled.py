"""OrthoMerge for any expert: rotate together what is rotation, merge the rest as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from orthomerge.merging.nesting import unfit_nested
from orthomerge.merging.parameters import NestedMethod
from orthomerge.merging.registry import Merged, merge_method
from orthomerge.merging.roles import unfit_block
from orthomerge.merging.spaces import Space
from orthomerge.merging.steps.modes import resolved
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.merging.draws import Draws
    from orthomerge.merging.steps.decoupling import Settings

__all__ = ["orthomerge_decoupled"]


def _workspace(shape: tuple[int, ...], models: int) -> int:
    """Return the float32 elements held: residuals, six n x n matrices, the nested method's own."""
    from orthomerge.merging.methods.tsv_m import workspace

    rows, columns = shape[0], math.prod(shape[1:])
    return models * rows * columns + 6 * columns**2 + workspace(shape, models)


def _residual(
    base: Tensor, deltas: Sequence[Tensor], model: int, *, role: str, **parameters: Any
) -> Tensor:
    """Return what one model leaves to the residual method, for its survey of the whole model."""
    from orthomerge.merging.steps.decoupling import residual_of

    return residual_of(base, deltas, _settings(parameters, len(deltas)), role, model)


def _unfit(shape: tuple[int, ...], role: str, parameters: Mapping[str, Any]) -> str | None:
    """Return why a tensor cannot be merged with these settings, or None."""
    if parameters["mode"] == "reproduce" and parameters["block"]:
        return "mode: reproduce knows no blocks, as the published code does not; leave block at 0"
    return unfit_block(shape, role, parameters) or unfit_nested(parameters["residual"], shape, role)


@merge_method(
    "orthomerge-decoupled",
    space=Space.DELTA,
    reference="arXiv:2602.05943",
    laws=("permutation",),
    negative_weights=False,
    divides_by_weight_sum=True,
    whole=True,
    workspace=_workspace,
    unfit=_unfit,
    residual=_residual,
    resolved=resolved,
)
def orthomerge_decoupled(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    role: str = "linear",
    survey: Any = None,
    draws: Draws | None = None,
    mode: Literal["robust", "faithful", "reproduce"] = "robust",
    variant: Literal["global", "conflict-aware"] = "global",
    residual: NestedMethod = None,
    gate: Literal["auto", "off"] | None = None,
    margin: Annotated[float, Between(0, 1)] = 0.1,
    strength: float = 1.0,
    correction: Literal["layer", "block", "none"] = "layer",
    c_max: Annotated[float | None, Between(1, infinite=True)] = None,
    zero_guard: Annotated[float, Between(0, 0.5)] = 1e-6,
    anchor: Annotated[float | None, Between(0)] = None,
    block: Annotated[int, Between(0)] = 0,
    chart: Literal["cayley", "log"] = "cayley",
    include_embeddings: bool = True,
    rotate_conv: bool = False,
) -> Merged:
    """Split each update into a rotation and a residual, merge each where it lives.

    ``R_i = argmin ‖W_0 R - X_i‖² + ρ ‖W_0‖²/n ‖R - I‖²`` over SO(n), X_i = W_i or, conflict-aware,
    W_0 plus the rows of D_i that oppose the mean update; the R_i are averaged as OFT adapters are;
    ``W = W_0 R + F(W_i - W_0 R_i)``. The gate sets R_i = I unless ``‖W_i - W_0 R_i‖ < (1 - margin)
    b ‖D_i‖``, b = √(1 - n/2o) or √(o/2n): what noise would leave. With no rotation, W is F's.

    Args:
        base: W_0 [o, n].
        deltas: D_i = W_i - W_0, one per model.
        weights: w_i >= 0, one per model; for the rotations they are divided by their sum.
        role: What the tensor is in the model: only weight matrices are rotated.
        survey: The residual method's survey of the whole model.
        draws: The residual method's random numbers.
        mode: Decides what is null: robust (anchor 1e-3, c_max 3√T, gate auto, residual tsv-m),
            faithful (the paper: 1e-6, none, off, the mean), reproduce (its code: anchor 0).
        variant: What a rotation is fitted to: the whole update, or the rows in conflict.
        residual: F, with its parameters; any method of task vectors.
        gate: auto rotates a layer only where its update is rotational; off always rotates.
        margin: How far below the level of noise the residual must be.
        strength: g, multiplies the merged generator.
        correction: One magnitude correction per layer (the paper), one per block, or none.
        c_max: Largest correction.
        zero_guard: Relative size of the mean generator below which the models cancel.
        anchor: ρ, pulls rotations to the identity where the weights do not determine them.
        block: Rotate blocks of this many inputs by themselves; 0 rotates all together.
        chart: Where rotations are averaged: Cayley (the paper) or the logarithm.
        include_embeddings: Rotate embeddings and output heads, too.
        rotate_conv: Rotate convolution kernels, seen as [out, in · kh · kw].

    References:
        Orthogonal Model Merging, arXiv:2602.05943: orthogonal-residual decoupling.
    """
    from orthomerge.merging.steps.decoupling import merge_decoupled

    settings = _settings(locals(), len(deltas))
    return merge_decoupled(base, deltas, weights, settings, role, survey, draws)


def _settings(parameters: dict[str, Any], models: int) -> Settings:
    from orthomerge.merging.steps.decoupling import Settings

    return Settings.of(parameters, models)
