"""Build a plan from headers only and report all problems at once.

Opens the sources, settles the method, hands the tensor lists to ``dense`` or ``oft``, and
checks what is common to both: parameters, weights, memory, disk, destination.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from orthomerge.adapters.config import CONFIG_NAME
from orthomerge.adapters.memory import AdapterState
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
from orthomerge.merging.plan import MERGED_KINDS, MergeRequest, OutputKind, Plan
from orthomerge.merging.planning import dense, lora, oft
from orthomerge.merging.planning.checks import check_parameters
from orthomerge.merging.planning.draft import Draft
from orthomerge.merging.planning.suitability import Route, source_problems
from orthomerge.merging.provenance import single_file_metadata
from orthomerge.merging.registry import MergeMethod, get_method
from orthomerge.merging.spaces import Space

__all__ = ["build_plan", "check_output", "memory_budget", "worker_count"]

_Result = TypeVar("_Result")


class _Planner(Protocol):
    """One module of this room: drafts the tasks of merges of one kind."""

    def draft_tasks(
        self,
        request: MergeRequest,
        method: MergeMethod,
        models: Sequence[Source],
        base: Source | None,
    ) -> Draft: ...


_FALLBACK_BUDGET = 4 << 30
_MAX_WORKERS = 8
_PLANNERS: dict[Route, _Planner] = {"rotations": oft, "factors": lora, "full": dense}


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
    route = _route(request, method, opened, base)
    problems += source_problems(request, method, opened, base, route)
    if problems:
        raise combined(problems)
    planner = _PLANNERS[route]
    draft = planner.draft_tasks(request, method, opened, base)
    unused = method.space is Space.WEIGHT and request.norm_matched is None
    if base is not None and unused and all(model.kind == "full" for model in opened):
        draft.notes.append(f"{method.name} does not use the base; config and tokenizer are its")
    if request.method is not None and method.name != request.method:
        known = request.method in method.aliases
        draft.notes.append(
            f"{request.method} is {method.name}{'' if known else ' for models like these'}"
        )
    weights = [t.weights for t in draft.tasks if t.kind in MERGED_KINDS and t.method is None]
    if weights and method.uses_weights and not any(map(any, weights)):
        draft.notes.append("all weights are 0: nothing of the models is merged")
    if method.caution:
        draft.notes.append(method.caution)
    if request.method is None and method.whole:
        draft.notes.append(
            f"{method.name} decomposes every weight matrix; --method "
            f"{'task-arithmetic' if base else 'linear'} takes seconds"
        )
    plan = _finish(request, method, opened, base, draft)
    problems += draft.problems + _config_problems(plan, draft) + _resource_problems(plan)
    if problems:
        raise combined(problems)
    return plan


def _collect(
    problems: list[OrthoMergeError],
    action: Callable[[CheckpointSource | AdapterState], _Result],
    argument: CheckpointSource | AdapterState,
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


def _route(
    request: MergeRequest, method: MergeMethod, models: list[Source], base: Source | None
) -> Route:
    """Return which planner drafts the tasks: what is written decides, and what the method reads."""
    if method.space is Space.ROTATION:
        return "rotations"
    adapters = request.form in ("lora", "dora") or (request.form == "auto" and base is None)
    all_lora = bool(models) and all(model.lora is not None for model in models)
    return "factors" if all_lora and adapters else "full"


def _default_method(models: list[Source], base: Source | None, all_rotations: bool) -> str:
    if all_rotations:
        return "orthomerge"
    if models and all(model.lora is not None for model in models):
        return "do-merging"
    if base is None:
        return "geodesic" if len(models) > 1 else "passthrough"
    return "orthomerge-decoupled"


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
    in_shards = kind == "folder" and CONFIG_NAME not in draft.written_files
    metadata = single_file_metadata(request, method.name, digested) if kind == "file" else {}
    if draft.lora is not None:
        metadata |= draft.lora.metadata(draft.lora.bounds)
    layout = plan_layout(
        [info for task in draft.tasks for info in task.outputs],
        max_shard_bytes=request.max_shard_bytes if in_shards else 1 << 62,
        filename=request.output.name if kind == "file" and request.output else draft.filename,
        metadata=metadata or None,
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
        written_files=draft.written_files if kind != "file" else {},
        compute_dtype=draft.compute_dtype,
        piece_elements=draft.piece_elements,
        convention=draft.convention,
        budget_bytes=memory_budget(request),
        workers=worker_count(request),
        survey_bytes=draft.survey_bytes,
        notes=tuple(draft.notes),
        lora=draft.lora,
    )


def _output_kind(output: Path | None) -> OutputKind:
    if output is None:
        return "memory"
    return "file" if output.suffix == ".safetensors" else "folder"


def _config_problems(plan: Plan, draft: Draft) -> list[OrthoMergeError]:
    """Refuse to write an adapter without the config that says how to read it."""
    if plan.output_kind != "file" or CONFIG_NAME not in draft.written_files:
        return []
    return [
        RecipeError(
            "a PEFT adapter is a folder: its config says how to read its tensors",
            file=plan.request.output,
            remedy="Name a folder; for LoRA adapters --style diffusers writes one file.",
        )
    ]


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
