"""Plan the merge of adapters that rotate: into one adapter, or into a full checkpoint with a base.

Headers only, but for the scales of an adapter that is to be written as one. A module that an
adapter does not rotate takes part as the identity rotation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from orthomerge.adapters.convention import EXACT, OftConvention
from orthomerge.adapters.export import common_convention, merged_oft_config
from orthomerge.adapters.keys import base_tensor_name
from orthomerge.adapters.oft import oft_key
from orthomerge.adapters.rotated import RotationAdapter
from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.dtypes import ITEM_SIZES, dtype_from_name
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import AdapterError, RecipeError
from orthomerge.merging.oft_modules import JoinedModule, joined_modules
from orthomerge.merging.plan import MergeRequest, Task
from orthomerge.merging.planning.carried import carried_names, carried_task, copy_task
from orthomerge.merging.planning.draft import (
    Draft,
    Settings,
    compute_dtype,
    is_float,
    piece_elements,
    resolve_settings,
    rule_problems,
    weight_sum_problem,
)
from orthomerge.merging.planning.files import add_model_files
from orthomerge.merging.planning.oft_targets import (
    adapter_problems,
    generator_problems,
    match_targets,
)
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.rules import LayerMap

__all__ = ["draft_tasks"]

_ALGEBRA_COPIES = 8  # fp64 copies of a module's blocks that are alive while it is merged


def draft_tasks(
    request: MergeRequest, method: MergeMethod, models: Sequence[Source], base: Source | None
) -> Draft:
    """Return the tasks of a merge of OFT adapters, with everything that is wrong with them."""
    draft = Draft(piece_elements=piece_elements(request), filename="adapter_model.safetensors")
    adapters = [model.rotations for model in models if model.rotations is not None]
    stored = base.checkpoint.tensors.values() if base else ()
    draft.compute_dtype = compute_dtype(request, [info.dtype for info in stored])
    draft.convention = _convention(request, adapters, base is not None, draft)
    modules = joined_modules(adapters, draft.problems)
    draft.problems += generator_problems(adapters)
    _note_identities(modules, adapters, draft)
    if base is None:
        _draft_adapter(request, method, adapters, modules, draft)
    else:
        _draft_full(request, method, adapters, modules, base, draft)
    return draft


def _convention(
    request: MergeRequest, adapters: Sequence[RotationAdapter], dense: bool, draft: Draft
) -> OftConvention:
    """Return how the merged generator becomes a rotation.

    ``auto`` keeps the adapters' own map where they agree and PEFT can still apply it, because they
    were trained through it; otherwise the exact Cayley map.
    """
    # In an adapter, today's PEFT would read the numbers of the older series with another one.
    common = common_convention(adapters, legacy=dense)
    if request.back_map == "exact" or (request.back_map == "auto" and common is None):
        if common_convention(adapters, legacy=True) is None:
            draft.notes.append("the adapters' Cayley conventions differ: the exact map is used")
        return EXACT
    if common is None:
        draft.problems.append(
            RecipeError(
                "back_map as_trained needs adapters of one convention that PEFT >= 0.18 applies",
                found=", ".join(str(adapter.convention) for adapter in adapters),
                remedy="Use back_map auto or exact.",
            )
        )
        return EXACT
    return common


def _note_identities(
    modules: dict[str, JoinedModule], adapters: Sequence[RotationAdapter], draft: Draft
) -> None:
    for position, adapter in enumerate(adapters):
        absent = [name for name, module in modules.items() if module.parts[position] is None]
        if absent:
            draft.notes.append(
                f"{adapter.origin} does not rotate {len(absent)} of {len(modules)} modules "
                f"(e.g. {absent[0]}): it takes part there as the identity"
            )


def _draft_adapter(
    request: MergeRequest,
    method: MergeMethod,
    adapters: Sequence[RotationAdapter],
    modules: dict[str, JoinedModule],
    draft: Draft,
) -> None:
    assert draft.convention is not None
    inexpressible = adapter_problems(adapters, modules)
    if inexpressible:
        draft.problems += inexpressible
        return
    layers = LayerMap.of([*modules, *carried_names(adapters)])
    draft.problems += rule_problems(request, method, layers.positions)
    for name, module in modules.items():
        own = next(part.dtype for part in module.parts if part)
        dtype = dtype_from_name(request.dtype) if request.dtype else own
        info = TensorInfo(oft_key(name, module.kind), dtype, module.packed_shape)
        settings = resolve_settings(request, method, name, layers)
        draft.tasks.append(_rotate_task(method, info, module, adapters, None, settings, draft))
    for name in carried_names(adapters):
        stored = next(a.source.tensors[a.others[name]] for a in adapters if name in a.others)
        draft.tasks += carried_task(request, method, stored, name, adapters, layers, draft)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.base_copies):
        models = tuple(adapter.base_copies.get(name) for adapter in adapters)
        info = next(a.source.tensors[k] for a, k in zip(adapters, models, strict=True) if k)
        draft.tasks.append(copy_task(info, models, None))
    try:
        config = merged_oft_config(
            adapters, draft.convention, {name: m.stored for name, m in modules.items()}
        )
        draft.written_files["adapter_config.json"] = json.dumps(config, indent=2) + "\n"
    except AdapterError as error:
        draft.problems.append(error)


def _draft_full(
    request: MergeRequest,
    method: MergeMethod,
    adapters: Sequence[RotationAdapter],
    modules: dict[str, JoinedModule],
    base: Source,
    draft: Draft,
) -> None:
    tensors = base.checkpoint.tensors
    targets = match_targets(modules, base, draft.problems)
    others: dict[str, str] = {}
    for name in carried_names(adapters):
        try:
            others[base_tensor_name(name, tensors)] = name
        except AdapterError:
            others[name] = name
            draft.notes.append(f"{name} is not in the base: added to the output")
    layers = LayerMap.of([*tensors, *others])
    draft.problems += rule_problems(request, method, layers.positions)
    for name in dict.fromkeys([*tensors, *others]):
        if name in others:
            carried = next(a for a in adapters if others[name] in a.others)
            stored = carried.source.tensors[carried.others[others[name]]]
            info = tensors.get(name, TensorInfo(name, stored.dtype, stored.shape))
            draft.tasks += carried_task(
                request, method, info, others[name], adapters, layers, draft
            )
            continue
        info = tensors[name]
        floating = is_float(info.dtype)
        dtype = dtype_from_name(request.dtype) if request.dtype and floating else info.dtype
        out = TensorInfo(name, dtype, info.shape)
        if name in targets:
            settings = resolve_settings(request, method, name, layers)
            draft.tasks.append(
                _rotate_task(method, out, targets[name], adapters, info, settings, draft)
            )
        else:
            draft.tasks.append(copy_task(out, (None,) * len(adapters), info))
    draft.filename = "model.safetensors"
    add_model_files(base, draft)


def _rotate_task(
    method: MergeMethod,
    info: TensorInfo,
    module: JoinedModule,
    adapters: Sequence[RotationAdapter],
    base: TensorInfo | None,
    settings: Settings,
    draft: Draft,
) -> Task:
    problem = weight_sum_problem(method, settings, [True] * len(module.parts), info.name)
    draft.problems += [problem] if problem else []
    blocks = module.num_blocks * module.block_size**2 * 8
    peak = blocks * (len(module.parts) + _ALGEBRA_COPIES)
    if base is not None:
        row = math.prod(base.shape[1:]) * (module.block_size if module.side == "left" else 1)
        lifted = ITEM_SIZES[draft.compute_dtype]
        peak += max(draft.piece_elements, row) * (ITEM_SIZES[base.dtype] + 4 * lifted)
    read_bytes = sum(
        adapter.source.tensors[key].nbytes
        for adapter, part in zip(adapters, module.parts, strict=True)
        for key in (part.keys if part else ())
    )
    return Task(
        info=info,
        kind="rotate",
        models=tuple(part.name if part else None for part in module.parts),
        base=base.name if base else None,
        weights=settings.weights,
        parameters=settings.parameters,
        peak_bytes=peak,
        read_bytes=read_bytes + (base.nbytes if base else 0),
    )
