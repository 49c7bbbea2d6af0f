"""What a merge of LoRA adapters would meet, measured without merging; the door ``explain``.

All refusals are those of the merge itself. What is measured is ``diagnostics``' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orthomerge.adapters.memory import AdapterState
from orthomerge.adapters.sources import open_source
from orthomerge.checkpoints.sources import CheckpointSource
from orthomerge.errors import OrthoMergeError, RecipeError
from orthomerge.merging.plan import Plan
from orthomerge.merging.planning.planner import build_plan
from orthomerge.recipe.run import plan, plan_recipe
from orthomerge.recipe.schema import MergeRecipe

if TYPE_CHECKING:
    from orthomerge.diagnostics import Comparison, MergeVerdict, ModuleComparison
    from orthomerge.merging.observing import MergedModule

__all__ = ["Explainable", "Explanation", "explain", "explainable", "measured"]

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


@dataclass(frozen=True)
class Explanation:
    """What a merge of LoRA adapters would meet.

    Attributes:
        plan: The merge itself.
        comparison: The adapters beside each other and the merged update, module by module.
        verdict: What that means, in a few sentences.
        notes: What is left out, in sentences.
    """

    plan: Plan
    comparison: Comparison
    verdict: MergeVerdict
    notes: tuple[str, ...]


def explain(
    models: Sequence[CheckpointSource | AdapterState],
    *,
    advance: Callable[[int], None] | None = None,
    **settings: Any,
) -> Explanation:
    """Measure what a merge of LoRA adapters would meet, without merging: ``merge --explain``.

    Args:
        models: LoRA adapters: paths, or adapters in memory.
        advance: Progress: called with input bytes as they are read, from any thread.
        **settings: As for ``merge``: the method, its parameters, ``weights``, ``base``, ...

    Raises:
        RecipeError: A source is no LoRA adapter.
        OrthoMergeError: The merge itself is refused.

    Example:
        >>> import torch
        >>> keys = [f"base_model.model.q.lora_{side}.weight" for side in "BA"]
        >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        >>> one = AdapterState(dict.fromkeys(keys, torch.ones(1, 1)), config, "one")
        >>> explain([one, one], method="sum").comparison.total.cosines[0]
        (1.0, 1.0)
    """
    _refuse_others(models)
    return measured(_explainable(plan(models, **settings)), advance=advance)


def explainable(recipe: MergeRecipe) -> Explainable:
    """Plan a merge of LoRA adapters that is to be looked at, from headers only.

    Raises:
        RecipeError: A source is no LoRA adapter.
        OrthoMergeError: The merge itself is refused.
    """
    _refuse_others([entry.path for entry in recipe.models])
    return _explainable(plan_recipe(recipe))


def _explainable(plan: Plan) -> Explainable:
    if any(task.kind == "factors" for task in plan.tasks):
        return Explainable(plan, plan, True, _left_out(plan))
    # Full weights are merged: take the same adapters as factors, for what they are beforehand.
    request = replace(plan.request, output=None)
    own = plan.method.factors is not None and not _dora(plan)
    if own:
        observed = build_plan(replace(request, form="lora"))
    else:
        observed = build_plan(
            replace(request, method=_READER, parameters=_ONLY_READ, norm_matched=None)
        )
    notes = () if own else (_unknown(plan.method.name),)
    return Explainable(plan, observed, own, (*notes, *_left_out(observed)))


def measured(found: Explainable, *, advance: Callable[[int], None] | None = None) -> Explanation:
    """Measure every module as the merge's own engine reads it.

    Args:
        found: What is looked at.
        advance: Progress, in input bytes.

    Raises:
        OrthoMergeError: As the merge itself would.
    """
    from orthomerge.diagnostics import compare_updates, compared, judge_updates
    from orthomerge.diagnostics.updates import with_rank
    from orthomerge.merging.run import observe_plan

    modules: dict[str, ModuleComparison] = {}

    def observe(seen: MergedModule) -> None:
        modules[seen.name] = compare_updates(
            seen.name,
            seen.factors,
            weights=seen.task.weights,
            merged=seen.merged if found.exact else None,
            facts=seen.facts if found.exact else None,
            scale=seen.scale if found.exact else None,
        )

    observe_plan(found.observed, observe, advance=advance)
    ranks = _written_ranks(found.plan, {name: part.spectrum for name, part in modules.items()})
    ordered = [with_rank(modules[name], ranks[name]) for name in found.modules]
    comparison = compared([model.origin for model in found.plan.models], ordered)
    return Explanation(found.plan, comparison, judge_updates(comparison), found.notes)


def _written_ranks(plan: Plan, spectra: Mapping[str, Sequence[float]]) -> dict[str, int | None]:
    """Return the rank that each module will be written with; None where no adapter is written."""
    output = plan.lora
    return dict.fromkeys(spectra, None) if output is None else dict(output.ranks(spectra))


def _refuse_others(models: Sequence[CheckpointSource | AdapterState]) -> None:
    """Refuse sources that are no LoRA adapters; what cannot be opened is the plan's to report."""
    try:
        sources = [open_source(model) for model in models]
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
