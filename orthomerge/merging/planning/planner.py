"""Build a plan from headers only and report all problems at once.

Opens the sources, settles the method, hands the tensor lists to ``dense`` or ``oft``, and
checks what is common to both: parameters, weights, memory, disk, destination.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from orthomerge.adapters.sources import Source, open_source, source_files
from orthomerge.checkpoints.destination import check_destination, partial_folder
from orthomerge.checkpoints.layout import plan_layout
from orthomerge.checkpoints.sources import CheckpointSource
from orthomerge.errors import (
    BudgetError,
    OrthoMergeError,
    ProblemsError,
    RecipeError,
    UnknownNameError,
    combined,
)
from orthomerge.merging.plan import MergeRequest, OutputKind, Plan
from orthomerge.merging.planning import dense, oft
from orthomerge.merging.planning.checks import check_parameters
from orthomerge.merging.planning.draft import Draft
from orthomerge.merging.provenance import single_file_metadata
from orthomerge.merging.registry import MergeMethod, get_method
from orthomerge.merging.spaces import Space

__all__ = ["build_plan", "check_output", "memory_budget", "worker_count"]

_Result = TypeVar("_Result")
_FALLBACK_BUDGET = 4 << 30
_MAX_WORKERS = 8


def build_plan(request: MergeRequest) -> Plan:
    """Plan a merge.

    Raises:
        ProblemsError: Several things are wrong; each is listed.
        OrthoMergeError: One thing is wrong.
    """
    problems: list[OrthoMergeError] = []
    models = [_collect(problems, open_source, source) for source in request.models]
    base = _collect(problems, open_source, request.base) if request.base is not None else None
    opened = [model for model in models if model is not None]
    if problems:
        problems += _named_method_problems(request)
        raise combined(problems)
    method = _choose_method(request, opened, base)
    problems += check_parameters(method, request.parameters, request.weights, len(opened))
    problems += _source_problems(request, method, opened, base)
    if problems:
        raise combined(problems)
    planner = oft if method.space is Space.ROTATION else dense
    draft = planner.draft_tasks(request, method, opened, base)
    if base is not None and method.space is Space.WEIGHT and request.norm_matched is None:
        draft.notes.append(f"{method.name} does not use the base; config and tokenizer are its")
    if request.method is not None and method.name != request.method:
        draft.notes.append(f"{request.method} is {method.name} for models like these")
    if request.method is None and method.whole:
        draft.notes.append(
            f"{method.name} decomposes every weight matrix; --method "
            f"{'task-arithmetic' if base else 'linear'} takes seconds"
        )
    plan = _finish(request, method, opened, base, draft)
    problems += draft.problems + _resource_problems(plan)
    if problems:
        raise combined(problems)
    return plan


def _collect(
    problems: list[OrthoMergeError],
    action: Callable[[CheckpointSource], _Result],
    argument: CheckpointSource,
) -> _Result | None:
    try:
        return action(argument)
    except ProblemsError as error:
        problems.extend(error.problems)
    except OrthoMergeError as error:
        problems.append(error)
    return None


def _named_method_problems(request: MergeRequest) -> list[OrthoMergeError]:
    if request.method is None:
        return []
    try:
        method = get_method(request.method)
    except UnknownNameError as error:
        return [error]
    return check_parameters(method, request.parameters, request.weights, len(request.models))


def _choose_method(request: MergeRequest, models: list[Source], base: Source | None) -> MergeMethod:
    all_rotations = bool(models) and all(model.rotations is not None for model in models)
    if request.method is None:
        return get_method(_default_method(models, base, all_rotations))
    method = get_method(request.method)
    if method.space is Space.ROTATION and method.dense and not all_rotations:
        return get_method(method.dense)
    return method


def _default_method(models: list[Source], base: Source | None, all_rotations: bool) -> str:
    if all_rotations:
        return "orthomerge"
    if base is None:
        return "geodesic" if len(models) > 1 else "passthrough"
    return "orthomerge-decoupled"


def _source_problems(
    request: MergeRequest, method: MergeMethod, models: list[Source], base: Source | None
) -> list[OrthoMergeError]:
    problems: list[OrthoMergeError] = []
    count, most = len(models), method.max_models or math.inf
    if not method.min_models <= count <= most:
        wanted = (
            f"exactly {method.min_models}"
            if most == method.min_models
            else f"at least {method.min_models}"
            if most == math.inf
            else f"{method.min_models} to {most}"
        )
        problems.append(
            RecipeError(f"{method.name} merges {wanted} model(s)", found=f"{count} given")
        )
    if method.needs_base and base is None:
        problems.append(
            RecipeError(
                f"{method.name} needs the base model",
                remedy="Pass --base (in a recipe: base), or use a method without one: linear.",
            )
        )
    for model in models:
        problem = _kind_problem(method, model, base, chosen_by_inputs=request.method is None)
        problems += [problem] if problem else []
    if request.norm_matched is not None and base is None and method.space is not Space.ROTATION:
        problems.append(
            RecipeError(
                "a norm-matched strength is relative to the base model",
                remedy="Pass --base (in a recipe: base), or leave norm_matched out.",
            )
        )
    if base is not None and base.kind != "full":
        problems.append(
            RecipeError(
                "the base must be a full checkpoint", file=base.origin, found=base.description
            )
        )
    return problems


def _kind_problem(
    method: MergeMethod, model: Source, base: Source | None, *, chosen_by_inputs: bool
) -> RecipeError | None:
    """Return why this method cannot merge this source, or None."""
    if method.space is Space.ROTATION:
        if model.rotations is not None:
            return None
        legal, remedy = "OFT adapters", "Give it OFT adapters, or use another method."
        if model.kind == "full" or _makes_updates(model):
            remedy = f"Use a method of task vectors, with --base: {method.dense or 'ties'}."
    elif model.kind == "full" or (_makes_updates(model) and base is not None):
        return None
    elif _makes_updates(model) and chosen_by_inputs:
        return RecipeError(
            "the adapters are merged into their base, as a full checkpoint",
            file=model.origin,
            found=model.description,
            remedy="Pass --base: the model they were trained on. Merging LoRA adapters into a LoRA "
            "adapter is not in this version.",
        )
    elif _makes_updates(model):
        legal = "full checkpoints, or adapters together with their base"
        remedy = "Pass --base (in a recipe: base): the model the adapter was trained on."
        if model.rotations is not None:
            remedy += " OFT adapters alone are merged by --method orthomerge."
    else:
        legal = "full checkpoints and LoRA, OFT, BOFT and HRA adapters"
        remedy = f"Merge each {model.kind} adapter into its base with PEFT first."
    return RecipeError(
        f"{method.name} merges {legal}", file=model.origin, found=model.description, remedy=remedy
    )


def _makes_updates(model: Source) -> bool:
    """Return whether it is an adapter whose change of a base weight can be computed."""
    return model.lora is not None or model.rotations is not None


def _finish(
    request: MergeRequest,
    method: MergeMethod,
    models: list[Source],
    base: Source | None,
    draft: Draft,
) -> Plan:
    kind = _output_kind(request.output)
    digested = len(models) + (base is not None)
    # PEFT reads an adapter from one file.
    in_shards = kind == "folder" and "adapter_config.json" not in draft.written_files
    metadata = single_file_metadata(request, method.name, digested) if kind == "file" else None
    layout = plan_layout(
        [task.info for task in draft.tasks],
        max_shard_bytes=request.max_shard_bytes if in_shards else 1 << 62,
        filename=request.output.name if kind == "file" and request.output else draft.filename,
        metadata=metadata,
    )
    return Plan(
        request=request,
        method=method,
        models=tuple(models),
        base=base,
        changes=draft.changes or (None,) * len(models),
        tasks=tuple(draft.tasks),
        layout=layout,
        output_kind=kind,
        copied_files=draft.copied_files if kind == "folder" else {},
        written_files=draft.written_files if kind == "folder" else {},
        compute_dtype=draft.compute_dtype,
        piece_elements=draft.piece_elements,
        convention=draft.convention,
        budget_bytes=memory_budget(request),
        workers=worker_count(request),
        survey_bytes=draft.survey_bytes,
        notes=tuple(draft.notes),
    )


def _output_kind(output: Path | None) -> OutputKind:
    if output is None:
        return "memory"
    return "file" if output.suffix == ".safetensors" else "folder"


def _resource_problems(plan: Plan) -> list[OrthoMergeError]:
    problems: list[OrthoMergeError] = []
    largest = max(plan.tasks, key=lambda task: task.peak_bytes, default=None)
    if largest and largest.peak_bytes > plan.budget_bytes:
        problems.append(
            BudgetError(
                "needs more working memory than the budget",
                tensor=largest.name,
                expected=f"at least {largest.peak_bytes} bytes",
                found=f"{plan.budget_bytes}",
                remedy="Raise --memory-budget.",
            )
        )
    if plan.survey_bytes > plan.budget_bytes:
        problems.append(
            BudgetError(
                "the survey of the whole model needs more working memory than the budget",
                expected=f"at least {plan.survey_bytes} bytes",
                found=f"{plan.budget_bytes}",
                remedy="Raise --memory-budget, or use scope: tensor.",
            )
        )
    output = plan.request.output
    if output is not None:
        folder = next(path for path in [output, *output.absolute().parents] if path.is_dir())
        free = shutil.disk_usage(folder).free + _reclaimable(output)
        if free < plan.write_bytes:
            problems.append(
                BudgetError(
                    "not enough free disk space",
                    file=folder,
                    expected=f"{plan.write_bytes} bytes",
                    found=f"{free} bytes",
                    remedy="Free some space or choose another output path.",
                )
            )
    return problems


def _reclaimable(output: Path) -> int:
    """Return the size of an earlier partial output, which will be continued or replaced."""
    partial = partial_folder(output) / "out"
    return sum(path.stat().st_blocks * 512 for path in partial.glob("*")) if partial.is_dir() else 0


def check_output(plan: Plan, *, overwrite: bool) -> None:
    """Refuse an output path that must not be written.

    Raises:
        OutputError: It exists, or would touch an input.
    """
    if plan.request.output is not None:
        sources = [*plan.models, *([plan.base] if plan.base else [])]
        inputs = [path for source in sources for path in source_files(source)]
        check_destination(
            plan.request.output, inputs, single_file=plan.output_kind == "file", overwrite=overwrite
        )


def worker_count(request: MergeRequest) -> int:
    """Return how many threads work on tensors."""
    if request.workers is not None:
        return request.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MAX_WORKERS, cores or 1))


def memory_budget(request: MergeRequest) -> int:
    """Return the working memory a merge may use: the request's, or half of what is free."""
    if request.memory_budget_bytes is not None:
        return request.memory_budget_bytes
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):
        return _FALLBACK_BUDGET
