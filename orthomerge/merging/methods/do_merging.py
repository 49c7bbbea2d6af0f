"""DO-Merging: decouple magnitudes from directions, and make low-rank updates orthogonal.

Decouple and Orthogonalize, arXiv:2505.15875; lowdin is from Gargiulo et al., arXiv:2412.00081.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from orthomerge.merging.lora.presets import resolved_preset
from orthomerge.merging.parameters import NestedLoraMethod
from orthomerge.merging.registry import Merged, merge_method
from orthomerge.merging.spaces import Space
from orthomerge.parameters import Between

if TYPE_CHECKING:
    from orthomerge.linalg.factors import Factors

__all__ = ["do_merging"]


@merge_method(
    "do-merging",
    space=Space.FACTORS,
    reference="arXiv:2505.15875",
    laws=("identity", "idempotent", "permutation", "scale-equivariance"),
    batched=True,
    resolved=resolved_preset,
)
def do_merging(
    factors: Sequence[Factors],
    *,
    weights: Sequence[float],
    draws: Any = None,
    preset: Literal["robust", "paper"] = "robust",
    orthogonalise: Literal["lowdin", "lbfgs", "gd", "adam", "ridge", "none"] | None = None,
    target: Literal["auto", "A", "B", "both"] | None = None,
    strength: Annotated[float | None, Between(0, 1)] = None,
    gamma: Annotated[float | None, Between(1e-4)] = None,
    gauge: Literal["balanced", "stored"] | None = None,
    normalise: bool | None = None,
    steps: Annotated[int | None, Between(1)] = None,
    tolerance: Annotated[float | None, Between(0)] = None,
    decouple_strength: Annotated[float | None, Between(0, 1)] = None,
    axis: Literal["in", "out"] | None = None,
    magnitude: Literal["mean", "median", "geomean", "rms", "max", "sum"] | None = None,
    magnitude_source: Literal["orth", "original"] | None = None,
    zero_columns: Literal["exclude", "include"] | None = None,
    cap: Annotated[float | None, Between(1, infinite=True)] = None,
    renormalise: bool | None = None,
    op: NestedLoraMethod = None,
    scale: Annotated[float | Literal["auto"] | None, Between()] = None,
) -> Merged:
    """Make updates orthogonal to each other, merge magnitudes and directions apart.

    B_i and A_i lose overlap; ``B_i A_i = W_i diag(α_i^p)``, α_i the column norms; ``D = λ F(W_1 …
    W_N) diag(ᾱ^p)``, F the weighted sum. At the defaults: TSV-M with all singular values.

    Args:
        factors: B_i [o, r_i], A_i [r_i, n], one update per model.
        weights: w_i, of either sign; only its size counts for ᾱ.
        draws: Random numbers, for F.
        preset: Decides what is null: robust, or paper, where what it leaves open is inferred.
        orthogonalise: Closed form lowdin, or ridge; lbfgs, gd or adam minimise the overlap; none.
        target: Which side; auto spares one that all share (mean principal cosine above 0.9).
        strength: t of lowdin: 0 leaves all as it is, 1 leaves no overlap.
        gamma: γ of lbfgs, gd, adam and ridge: the cost of moving away from the adapters.
        gauge: balanced splits each update's singular values evenly over B and A first.
        normalise: Measure γ in units of the factors' mean square.
        steps: Most steps of lbfgs, gd and adam.
        tolerance: Relative gradient at which lbfgs and gd stop.
        decouple_strength: p: 1 gives all updates equal say in a column, 0 leaves magnitudes alone.
        axis: Columns are inputs (in, the paper) or rows, which are outputs (out).
        magnitude: How column magnitudes are merged.
        magnitude_source: Magnitudes before (original) or after (orth) making updates orthogonal.
        zero_columns: Whether columns of zeros count in the merged magnitude.
        cap: Most that a column is amplified over what it was before.
        renormalise: Give merged columns exactly the merged magnitude.
        op: F, another method for low-rank factors with its parameters; null is the weighted sum.
        scale: λ, or auto: the mean norm of the updates, with λ in [1/N, 2].
    """
    from orthomerge.merging.lora.decorrelating import do_merge

    return do_merge(factors, weights, {
        "draws": draws, "preset": preset, "orthogonalise": orthogonalise, "target": target,
        "steps": steps, "tolerance": tolerance, "decouple_strength": decouple_strength,
        "axis": axis, "magnitude": magnitude, "magnitude_source": magnitude_source, "op": op,
        "zero_columns": zero_columns, "cap": cap, "renormalise": renormalise, "scale": scale,
        "strength": strength, "gamma": gamma, "gauge": gauge, "normalise": normalise})  # fmt: skip
