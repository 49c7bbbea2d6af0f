"""Check that sources, method and what is to be written fit together, from what the sources are.

Whether their tensors fit together is checked when the tasks are drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from orthomerge.adapters.sources import Source
from orthomerge.errors import OrthoMergeError, RecipeError
from orthomerge.merging.plan import MergeRequest
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.spaces import Space

__all__ = ["Route", "source_problems"]

#: What is worked on: OFT generators, LoRA factors, or full weights.
Route = Literal["rotations", "factors", "full"]

#: PEFT's kinds that add tokens or states and leave every weight as it is.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
_BASE = "Pass --base (in a recipe: base)"


def source_problems(
    request: MergeRequest,
    method: MergeMethod,
    models: Sequence[Source],
    base: Source | None,
    route: Route,
) -> list[OrthoMergeError]:
    """Return everything about the sources that this method, or this output, cannot deal with."""
    problems: list[OrthoMergeError] = []
    problems += _count_problems(method, len(models))
    problems += _form_problems(request, method, models, base, route)
    if method.needs_base and base is None and route != "factors":
        problems.append(
            RecipeError(
                f"{method.name} needs the base model",
                remedy=f"{_BASE}, or use a method without one: linear.",
            )
        )
    if route == "factors":
        problems += _factors_problems(method)
    else:
        named = request.method is not None
        found = (_kind_problem(method, model, base, chosen=not named) for model in models)
        problems += [problem for problem in found if problem]
    if request.norm_matched is not None and base is None and route == "full":
        problems.append(
            RecipeError(
                "a norm-matched strength is relative to the base model",
                remedy=f"{_BASE}, or leave norm_matched out.",
            )
        )
    if base is not None and base.kind != "full":
        problems.append(
            RecipeError(
                "the base must be a full checkpoint", file=base.origin, found=base.description
            )
        )
    return problems


def _count_problems(method: MergeMethod, count: int) -> list[OrthoMergeError]:
    most = method.max_models or math.inf
    if method.min_models <= count <= most:
        return []
    wanted = (
        f"exactly {method.min_models}"
        if most == method.min_models
        else f"at least {method.min_models}"
        if most == math.inf
        else f"{method.min_models} to {most}"
    )
    return [RecipeError(f"{method.name} merges {wanted} model(s)", found=f"{count} given")]


def _form_problems(
    request: MergeRequest,
    method: MergeMethod,
    models: Sequence[Source],
    base: Source | None,
    route: Route,
) -> list[OrthoMergeError]:
    """Return why the output cannot have the form or rank that was asked for."""
    problems: list[OrthoMergeError] = []
    other = [model for model in models if model.lora is None]
    if request.form in ("lora", "dora") and other:
        problems.append(
            RecipeError(
                f"only LoRA adapters can be merged into a {request.form} adapter",
                file=other[0].origin,
                found=other[0].description,
                remedy="Leave --as out; orthomerge extract makes adapters of merged models.",
            )
        )
    if request.form in ("full", "dora") and base is None:
        wanted = "a full checkpoint" if request.form == "full" else "a DoRA adapter"
        problems.append(
            RecipeError(f"{wanted} needs the base model", remedy=f"{_BASE}, or leave --as out.")
        )
    if request.rank is not None and route != "factors":
        problems.append(
            RecipeError(
                "only a merged LoRA adapter has a rank",
                remedy="Merge LoRA adapters with --as lora, or leave --rank out.",
            )
        )
    problems += _unused_problems(request, method, route)
    if request.kept_head is not None and not 0 <= request.kept_head < len(models):
        problems.append(
            RecipeError(
                "heads keep:N names a model by its place",
                expected=f"1 to {len(models)}",
                found=request.heads,
            )
        )
    return problems


def _unused_problems(
    request: MergeRequest, method: MergeMethod, route: Route
) -> list[OrthoMergeError]:
    """Return a problem for each setting that nothing on this route would look at."""
    problems: list[OrthoMergeError] = []
    if route != "factors" and (request.style != "auto" or request.component is not None):
        problems.append(
            RecipeError(
                "only a merged LoRA adapter has a style or a component",
                remedy="Merge LoRA adapters with --as lora, or leave --style out.",
            )
        )
    separate = route == "factors" or (route == "full" and method.space is Space.FACTORS)
    if request.absent != "zero" and not separate:
        problems.append(
            RecipeError(
                f"{method.name} merges whole models here, in which no module is absent",
                found=f"absent: {request.absent}",
                remedy="Leave --absent out, or merge LoRA adapters with --as lora.",
            )
        )
    return problems


def _factors_problems(method: MergeMethod) -> list[OrthoMergeError]:
    """Return why a method cannot merge low-rank factors without their base."""
    if method.merges_factors:
        return []
    return [
        RecipeError(
            f"{method.name} needs the base's weights, so it cannot merge adapters alone",
            remedy=f"{_BASE}, to get a full checkpoint, or use do-merging.",
        )
    ]


def _kind_problem(
    method: MergeMethod, model: Source, base: Source | None, *, chosen: bool
) -> RecipeError | None:
    """Return why this method cannot merge this source into full weights, or None."""
    if method.space is Space.ROTATION:
        if model.rotations is not None:
            return None
        legal, remedy = "OFT adapters", "Give it OFT adapters, or use another method."
        if model.kind == "full" or _makes_updates(model):
            remedy = f"Use a method of task vectors, with --base: {method.dense or 'ties'}."
    elif method.space is Space.FACTORS:
        if model.lora is not None:
            return None
        legal, remedy = "LoRA adapters", "For models of other kinds, with --base: tsv-m."
    elif model.kind == "full" or (_makes_updates(model) and base is not None):
        return None
    elif _makes_updates(model) and chosen:
        return RecipeError(
            "an adapter beside models of other kinds is merged into its base, as a full checkpoint",
            file=model.origin,
            found=model.description,
            remedy=f"{_BASE}: the model they were trained on.",
        )
    elif _makes_updates(model):
        legal = "full checkpoints, or adapters together with their base"
        remedy = f"{_BASE}: the model the adapter was trained on."
        if model.rotations is not None:
            remedy += " OFT adapters alone are merged by --method orthomerge."
    else:
        legal = "full checkpoints and LoRA, OFT, BOFT and HRA adapters"
        remedy = (
            "It changes no weights, so there is nothing to merge: leave it out."
            if model.kind in _PROMPTS
            else f"Merge each {model.kind} adapter into its base with PEFT first."
        )
    return RecipeError(
        f"{method.name} merges {legal}", file=model.origin, found=model.description, remedy=remedy
    )


def _makes_updates(model: Source) -> bool:
    """Return whether it is an adapter whose change of a base weight can be computed."""
    return model.lora is not None or model.rotations is not None
