"""The plan behind ``merge --explain``: LoRA adapters seen as low-rank factors before they merge.

All refusals are those of the merge itself. What is measured is not this module's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orthomerge.adapters.sources import open_source
from orthomerge.errors import OrthoMergeError, RecipeError
from orthomerge.merging.plan import Plan
from orthomerge.merging.planning.planner import build_plan
from orthomerge.recipe.run import plan_recipe, request_from
from orthomerge.recipe.schema import MergeRecipe

__all__ = ["Explainable", "explainable", "written_ranks"]

# A method of low-rank factors that does no work, to have the adapters read.
_READER, _ONLY_READ = "do-merging", {"orthogonalise": "none"}


@dataclass(frozen=True)
class Explainable:
    """A merge of LoRA adapters that can be looked at.

    Attributes:
        plan: The merge itself.
        observed: The plan whose tasks show every module's factors.
        exact: Whether ``observed`` merges as ``plan`` does; otherwise it only reads the adapters.
        notes: What is left out, in sentences.
    """

    plan: Plan
    observed: Plan
    exact: bool
    notes: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are shown, by path, in the order of the output."""
        return tuple(task.module for task in self.observed.tasks if task.kind == "factors")


def explainable(recipe: MergeRecipe) -> Explainable:
    """Plan a merge of LoRA adapters that is to be looked at, from headers only.

    Raises:
        RecipeError: A source is no LoRA adapter.
        OrthoMergeError: The merge itself is refused.
    """
    _refuse_others(recipe)
    plan = plan_recipe(recipe)
    if any(task.kind == "factors" for task in plan.tasks):
        return Explainable(plan, plan, True, _left_out(plan))
    # Full weights are merged: take the same adapters as factors, for what they are beforehand.
    request = replace(request_from(recipe), output=None)
    own = plan.method.factors is not None and not _dora(plan)
    if own:
        observed = build_plan(replace(request, form="lora"))
    else:
        observed = build_plan(
            replace(request, method=_READER, parameters=_ONLY_READ, norm_matched=None)
        )
    notes = () if own else (_unknown(plan.method.name),)
    return Explainable(plan, observed, own, (*notes, *_left_out(observed)))


def written_ranks(plan: Plan, spectra: Mapping[str, Sequence[float]]) -> dict[str, int | None]:
    """Return the rank that each module will be written with; None where no adapter is written.

    Args:
        plan: The merge.
        spectra: Singular values of each merged module, descending.

    Raises:
        RecipeError: The budget of parameters is too small for rank 1 everywhere.
    """
    output = plan.lora
    return dict.fromkeys(spectra, None) if output is None else dict(output.ranks(spectra))


def _refuse_others(recipe: MergeRecipe) -> None:
    """Refuse sources that are no LoRA adapters; what cannot be opened is the plan's to report."""
    try:
        sources = [open_source(entry.path) for entry in recipe.models]
    except OrthoMergeError:
        return
    other = next((source for source in sources if source.lora is None), None)
    if other is not None:
        raise RecipeError(
            "--explain compares LoRA adapters",
            file=other.origin,
            found=other.description,
            remedy="For models of other kinds use orthomerge diagnose, with --base unless they "
            "are OFT adapters.",
        )


def _unknown(method: str) -> str:
    return (
        f"{method} with a base merges full weights, so what it does to the alignment is not "
        "measured"
    )


def _left_out(plan: Plan) -> tuple[str, ...]:
    notes = []
    others = sum(task.kind != "factors" for task in plan.tasks) if plan.base is None else 0
    if others:
        notes.append(f"{others} tensors beside the factors (heads, whole weights) are not compared")
    if _dora(plan):
        notes.append("of DoRA only the low-rank part is compared, not how magnitudes scale W_0")
    return tuple(notes)


def _dora(plan: Plan) -> bool:
    return any(model.lora is not None and model.lora.dora for model in plan.models)
