"""Plan the merge of LoRA adapters into one LoRA adapter; only DoRA needs their base.

Headers only. A module that an adapter does not change takes part as a change of zero, as it would
in full weights, unless the request says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from orthomerge.adapters.lora import LoraAdapter
from orthomerge.adapters.lora_renaming import converted_module
from orthomerge.adapters.lora_styles import LoraStyle, component_of
from orthomerge.adapters.lora_updates import LoraUpdate
from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.dtypes import dtype_from_name
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import AdapterError, OrthoMergeError
from orthomerge.merging.lora.modules import JoinedLora, joined_lora
from orthomerge.merging.lora.output import LoraOutput
from orthomerge.merging.plan import MergeRequest, Task
from orthomerge.merging.planning.agreement import agreement_problems, module_problems
from orthomerge.merging.planning.carried import carried_names, carried_task, copy_task
from orthomerge.merging.planning.draft import (
    Draft,
    compute_dtype,
    piece_elements,
    resolve_settings,
    rule_problems,
    weight_sum_problem,
)
from orthomerge.merging.planning.memory import base_bytes, factors_bytes
from orthomerge.merging.planning.model_scope import check_factored, check_model_survey
from orthomerge.merging.planning.views import open_views
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.rules import LayerMap

__all__ = ["draft_tasks"]

_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks for it in a folder


def draft_tasks(
    request: MergeRequest, method: MergeMethod, models: Sequence[Source], base: Source | None
) -> Draft:
    """Return the tasks of a merge of LoRA adapters, with everything that is wrong with them."""
    draft = Draft(piece_elements=piece_elements(request), filename="adapter_model.safetensors")
    adapters = [model.lora for model in models if model.lora is not None]
    modules = joined_lora(adapters, draft.problems)
    stored = [part.dtype for module in modules.values() for part in module.parts if part]
    draft.compute_dtype = compute_dtype(request, stored)
    draft.problems += agreement_problems(request, adapters)
    draft.problems += module_problems(request, modules, adapters, has_base=base is not None)
    weights = _base_weights(request, models, base, draft)
    _note_absent(request, adapters, modules, draft)
    if draft.problems:
        return draft
    try:
        draft.lora = _output(request, method, adapters, modules, base)
    except OrthoMergeError as error:
        draft.problems.append(error)
        return draft
    if draft.lora.style != "peft" and (whole := [a for a in adapters if a.others or a.base_copies]):
        draft.problems.append(_uncarried(whole, draft.lora.style))
        return draft
    if draft.lora.style == "diffusers":
        draft.filename = _DIFFUSERS_FILE
    layers = LayerMap.of([*modules, *carried_names(adapters)])
    draft.problems += rule_problems(request, method, layers.positions)
    for module in modules.values():
        task = _factors_task(request, method, module, adapters, layers, draft)
        onto = weights[module.name] if draft.lora.dora else None
        draft.tasks.append(task if onto is None else _with_base(task, *onto, draft))
    check_model_survey(request, method, draft)
    for name in carried_names(adapters):
        info = next(a.source.tensors[a.others[name]] for a in adapters if name in a.others)
        draft.tasks += carried_task(request, method, info, name, adapters, layers, draft)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.base_copies):
        keys = tuple(adapter.base_copies.get(name) for adapter in adapters)
        info = next(a.source.tensors[k] for a, k in zip(adapters, keys, strict=True) if k)
        draft.tasks.append(copy_task(info, keys, None))
    draft.written_files |= draft.lora.files(draft.lora.bounds)
    return draft


def _base_weights(
    request: MergeRequest, models: Sequence[Source], base: Source | None, draft: Draft
) -> dict[str, tuple[TensorInfo, bool]]:
    """Return the base's weight of each module and whether its columns are output features.

    Adapters that do not fit it are reported.
    """
    if base is None or draft.problems:
        return {}
    views = open_views(models, base, draft.problems, kept_head=request.kept_head)
    draft.changes = tuple(view.changes for view in views)
    return {
        update.module.name: (base.checkpoint.tensors[name], update.turned)
        for changes in draft.changes
        if changes is not None
        for name, update in changes.updates.items()
        if isinstance(update, LoraUpdate)
    }


def _with_base(task: Task, weight: TensorInfo, turned: bool, draft: Draft) -> Task:
    """Let a task read the base's weight, for DoRA's norms."""
    peak = task.peak_bytes + base_bytes(weight, draft, turned=turned)
    read = task.read_bytes + weight.nbytes
    return replace(task, base=weight.name, batch=None, peak_bytes=peak, read_bytes=read)


def _output(
    request: MergeRequest,
    method: MergeMethod,
    adapters: Sequence[LoraAdapter],
    modules: dict[str, JoinedLora],
    base: Source | None,
) -> LoraOutput:
    bounds, rule = {}, request.rank
    for name, module in modules.items():
        taking_part = [rank for rank in module.ranks if rank]
        lossless = min(method.output_rank(taking_part), module.rows, module.columns)
        most = int(rule.value) if rule and not rule.from_data else lossless
        bounds[name] = max(1, min(most, lossless))
    dtype = dtype_from_name(request.dtype) if request.dtype else None
    configs = [adapter.config for adapter in adapters]
    saved = {name for config in configs for name in config.names("modules_to_save")}
    first = configs[0]
    return LoraOutput(
        modules=modules,
        dtypes={name: dtype or module.first.dtype for name, module in modules.items()},
        bounds=bounds,
        rule=rule,
        settings={
            "base_model": first.values.get("base_model_name_or_path"),
            "revision": first.values.get("revision"),
            "task_type": first.values.get("task_type"),
            "fan_in_fan_out": first.value("fan_in_fan_out", bool, False),
            "modules_to_save": saved,
        },
        dora=request.form == "dora",
        style=adapters[0].style if request.style == "auto" else request.style,
        names=_written_names(request, adapters[0].style, modules, base),
    )


def _written_names(
    request: MergeRequest, own: LoraStyle, modules: Iterable[str], base: Source | None
) -> dict[str, str]:
    """Return what the format of the output calls each module."""
    wanted = request.style
    if wanted == "auto" or wanted == own:
        return {name: name for name in modules}
    tensors = base.checkpoint.tensors if base else ()
    paths = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    encoders = {part for name in modules if (part := component_of(name) or "").startswith("text_")}
    return {
        name: converted_module(
            name,
            own,
            wanted,
            component=request.component,
            encoders=len(encoders),
            base_modules=paths,
        )
        for name in modules
    }


def _uncarried(adapters: Sequence[LoraAdapter], style: LoraStyle) -> AdapterError:
    return AdapterError(
        f"{style}'s format holds no whole tensors beside the factors, such as trained heads",
        file=", ".join(adapter.origin for adapter in adapters),
        tensor=next(iter({**adapters[0].others, **adapters[0].base_copies})),
        remedy="Write a PEFT adapter: leave --style out.",
    )


def _factors_task(
    request: MergeRequest,
    method: MergeMethod,
    module: JoinedLora,
    adapters: Sequence[LoraAdapter],
    layers: LayerMap,
    draft: Draft,
) -> Task:
    assert draft.lora is not None
    settings = resolve_settings(request, method, module.name, layers)
    present = [part is not None or request.absent == "zero" for part in module.parts]
    problem = weight_sum_problem(method, settings, present, module.name)
    if problem:
        draft.report_once(problem)
    info, *partners = draft.lora.infos(module.name, draft.lora.bounds[module.name])
    # A nested method sees one module at a time, with random numbers of its own.
    alone = not method.batched or any(isinstance(v, Mapping) for v in settings.parameters.values())
    shape = module.kind, module.rows, module.columns, module.ranks, info.shape, info.dtype
    task = Task(
        info=info,
        kind="factors",
        models=tuple(part.name if part else None for part in module.parts),
        base=None,
        weights=settings.weights,
        parameters=settings.parameters,
        peak_bytes=factors_bytes(module, method, settings.parameters, draft.compute_dtype),
        read_bytes=sum(
            adapter.source.tensors[key].nbytes
            for adapter, part in zip(adapters, module.parts, strict=True)
            for key in (part.keys if part else ())
        ),
        partners=tuple(partners),
        batch=None if alone else (shape, settings.weights, repr(settings.parameters)),
    )
    check_factored(method, task, module, draft)
    return task


def _note_absent(
    request: MergeRequest,
    adapters: Sequence[LoraAdapter],
    modules: dict[str, JoinedLora],
    draft: Draft,
) -> None:
    meaning = "it is left out there" if request.absent == "skip" else "it counts as no change there"
    for position, adapter in enumerate(adapters):
        absent = [name for name, module in modules.items() if module.parts[position] is None]
        if absent:
            draft.notes.append(
                f"{adapter.origin} does not change {len(absent)} of {len(modules)} modules "
                f"(e.g. {absent[0]}): {meaning}"
            )
