"""DO-Merging: decouple magnitudes from directions, and make low-rank updates orthogonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from orthomerge.merging.parameters import Between, NestedLoraMethod
from orthomerge.merging.presets import resolved_preset
from orthomerge.merging.registry import Merged, merge_method
from orthomerge.merging.spaces import Space

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
    survey: Any = None,
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

    ``D_i = B_i A_i``; B_i and A_i become the least overlapping; ``D_i = W_i diag(α_i^p)`` with α_i
    the column norms; ``D = λ F(W_1 … W_N) diag(ᾱ^p)``, F the weighted sum, ᾱ the mean magnitude.
    At the defaults, and where no side is one shared frame, this is TSV-M with all singular values.

    Args:
        factors: B_i [o, r_i], A_i [r_i, n], one update per model.
        weights: w_i, of either sign; magnitudes are merged with \\|w_i\\|.
        survey: Of the whole model, for F.
        draws: Random numbers, for F.
        preset: Decides what is null: robust (lowdin, balanced, no decoupling), or paper (gd with
            γ = 1 on stored factors, full decoupling; settings that the paper leaves open inferred).
        orthogonalise: Closed form lowdin, or ridge; lbfgs, gd or adam minimise the overlap; none.
        target: Which factors; auto spares a side that all adapters share (mean principal cosine
            above 0.9), unless they share both.
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

    Returns:
        The merged factors of rank Σ r_i; λ, overlap before and after and drift of each side, and
        the ratio of the largest update to the smallest.

    References:
        Decouple and Orthogonalize, arXiv:2505.15875; lowdin: Gargiulo et al., arXiv:2412.00081.
    """
    from orthomerge.merging.decorrelating import do_merge

    supplied = {"survey": survey, "draws": draws}
    settings = resolved_preset(
        {k: v for k, v in locals().items() if k not in ("factors", "weights", "supplied")}, 0
    )
    return do_merge(factors, weights, settings, **supplied)
