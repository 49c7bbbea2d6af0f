"""Plan the merge of OFT adapters: into one adapter, or into a full checkpoint when a base is given.

Headers only. A module that an adapter does not rotate takes part as the identity rotation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from orthomerge.adapters.convention import EXACT, Kind, OftConvention
from orthomerge.adapters.export import merged_oft_config
from orthomerge.adapters.keys import base_tensor_name, base_weight_name
from orthomerge.adapters.oft import OftAdapter, OftModule, oft_key
from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.dtypes import ITEM_SIZES, dtype_from_name
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import AdapterError, OrthoMergeError, RecipeError
from orthomerge.merging.draft import (
    Draft,
    Settings,
    compute_dtype,
    is_float,
    piece_elements,
    resolve_settings,
    rule_problems,
    weight_sum_problem,
)
from orthomerge.merging.files import add_model_files
from orthomerge.merging.plan import MergeRequest, Task, TaskKind
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.rules import LayerMap

__all__ = ["MergedModule", "draft_tasks", "merged_modules"]

_ALGEBRA_COPIES = 8  # fp64 copies of a module's blocks that are alive while it is merged
_AVERAGE = "linear"


@dataclass(frozen=True, slots=True)
class MergedModule:
    """One rotated module of the output.

    Args:
        name: Module path.
        kind: Linear (or convolution), or embedding.
        num_blocks: Blocks to store; 1 if shared.
        block_size: Common block size: the adapters' least common multiple.
        shared: Every adapter that rotates it shares one block.
        parts: The module in each adapter; None where it is not rotated.
    """

    name: str
    kind: Kind
    num_blocks: int
    block_size: int
    shared: bool
    parts: tuple[OftModule | None, ...]

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the stored tensor."""
        return self.num_blocks, self.block_size * (self.block_size - 1) // 2


def draft_tasks(
    request: MergeRequest, method: MergeMethod, models: Sequence[Source], base: Source | None
) -> Draft:
    """Return the tasks of a merge of OFT adapters, with everything that is wrong with them."""
    draft = Draft(piece_elements=piece_elements(request), filename="adapter_model.safetensors")
    adapters = [model.oft for model in models if model.oft is not None]
    stored = base.checkpoint.tensors.values() if base else ()
    draft.compute_dtype = compute_dtype(request, [info.dtype for info in stored])
    draft.convention = _convention(request, adapters, base is not None, draft)
    modules = merged_modules(adapters, draft.problems)
    _note_identities(modules, adapters, draft)
    if base is None:
        _draft_adapter(request, method, adapters, modules, draft)
    else:
        _draft_full(request, method, adapters, modules, base, draft)
    return draft


def merged_modules(
    adapters: Sequence[OftAdapter], problems: list[OrthoMergeError]
) -> dict[str, MergedModule]:
    """Match the adapters' modules by name and settle their common block size."""
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    merged = {}
    for name in names:
        parts = tuple(adapter.modules.get(name) for adapter in adapters)
        try:
            merged[name] = _merged_module(name, parts)
        except AdapterError as error:
            problems.append(error)
    return merged


def _merged_module(name: str, parts: tuple[OftModule | None, ...]) -> MergedModule:
    present = [part for part in parts if part is not None]
    size = math.lcm(*(part.block_size for part in present))
    shared = all(part.shared for part in present)
    widths = {part.num_blocks * part.block_size for part in present if not part.shared}
    if len({part.kind for part in present}) > 1 or len(widths) > 1:
        raise AdapterError(
            "the adapters disagree about this module",
            tensor=name,
            found=", ".join(f"{part.kind} {part.num_blocks}x{part.block_size}" for part in present),
            remedy="Merge adapters that were trained on one base model.",
        )
    width = next(iter(widths), size)
    if width % size:
        raise AdapterError(
            "the adapters' block sizes have no common multiple that divides its width",
            tensor=name,
            expected=f"a divisor of {width}",
            found=f"{size}",
            remedy="Merge adapters of one block size.",
        )
    blocks = 1 if shared else width // size
    return MergedModule(name, present[0].kind, blocks, size, shared, parts)


def _convention(
    request: MergeRequest, adapters: Sequence[OftAdapter], dense: bool, draft: Draft
) -> OftConvention:
    """Return how the merged generator becomes a rotation.

    ``auto`` keeps the adapters' own map where they agree and PEFT can still apply it, because they
    were trained through it; otherwise the exact Cayley map.
    """
    found = {adapter.convention for adapter in adapters}
    common = next(iter(found)) if len(found) == 1 else None
    if common is not None and common.legacy and not dense:
        common = None  # today's PEFT would read the numbers with another series
    if request.back_map == "exact" or (request.back_map == "auto" and common is None):
        if len(found) > 1:
            draft.notes.append("the adapters' Cayley conventions differ: the exact map is used")
        return EXACT
    if common is None:
        draft.problems.append(
            RecipeError(
                "back_map as_trained needs adapters of one convention that PEFT >= 0.18 applies",
                found=", ".join(map(str, found)),
                remedy="Use back_map auto or exact.",
            )
        )
        return EXACT
    return common


def _note_identities(
    modules: dict[str, MergedModule], adapters: Sequence[OftAdapter], draft: Draft
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
    adapters: Sequence[OftAdapter],
    modules: dict[str, MergedModule],
    draft: Draft,
) -> None:
    assert draft.convention is not None
    layers = LayerMap.of([*modules, *_other_names(adapters)])
    draft.problems += rule_problems(request, method, layers.positions)
    for name, module in modules.items():
        stored = next(part.dtype for part in module.parts if part)
        dtype = dtype_from_name(request.dtype) if request.dtype else stored
        info = TensorInfo(oft_key(name, module.kind), dtype, module.packed_shape)
        settings = resolve_settings(request, method, name, layers)
        draft.tasks.append(_rotate_task(method, info, module, None, settings, draft))
    for name in _other_names(adapters):
        key = next(a.others[name] for a in adapters if name in a.others)
        draft.tasks += _other_task(request, method, key, name, adapters, layers, draft)
    for position, adapter in enumerate(adapters):
        known = {task.name for task in draft.tasks}
        for key in adapter.base_copies.values():
            if key not in known:
                info = adapter.source.tensors[key]
                models = tuple(key if i == position else None for i in range(len(adapters)))
                draft.tasks.append(
                    _copy_task(TensorInfo(key, info.dtype, info.shape), models, None)
                )
    try:
        config = merged_oft_config(
            adapters, draft.convention, {name: m.block_size for name, m in modules.items()}
        )
        draft.written_files["adapter_config.json"] = json.dumps(config, indent=2) + "\n"
    except AdapterError as error:
        draft.problems.append(error)


def _draft_full(
    request: MergeRequest,
    method: MergeMethod,
    adapters: Sequence[OftAdapter],
    modules: dict[str, MergedModule],
    base: Source,
    draft: Draft,
) -> None:
    tensors = base.checkpoint.tensors
    targets: dict[str, MergedModule] = {}
    others: dict[str, str] = {}
    for name, module in modules.items():
        try:
            targets[base_weight_name(name, tensors)] = module
            draft.problems += _width_problems(module, tensors[base_weight_name(name, tensors)])
        except AdapterError as error:
            draft.problems.append(error)
    for name in _other_names(adapters):
        try:
            others[base_tensor_name(name, tensors)] = name
        except AdapterError:
            others[name] = name
            draft.notes.append(f"{name} is not in the base: added to the output")
    layers = LayerMap.of([*tensors, *others])
    draft.problems += rule_problems(request, method, layers.positions)
    for name in dict.fromkeys([*tensors, *others]):
        if name in others:
            draft.tasks += _other_task(request, method, name, others[name], adapters, layers, draft)
            continue
        info = tensors[name]
        floating = is_float(info.dtype)
        dtype = dtype_from_name(request.dtype) if request.dtype and floating else info.dtype
        out = TensorInfo(name, dtype, info.shape)
        if name in targets:
            settings = resolve_settings(request, method, name, layers)
            draft.tasks.append(_rotate_task(method, out, targets[name], info, settings, draft))
        else:
            draft.tasks.append(_copy_task(out, (None,) * len(adapters), info))
    draft.filename = "model.safetensors"
    add_model_files(base, draft)


def _width_problems(module: MergedModule, info: TensorInfo) -> list[OrthoMergeError]:
    columns = math.prod(info.shape[1:]) if len(info.shape) > 1 else 0
    width = module.num_blocks * module.block_size
    fits = columns > 0 and (columns % width == 0 if module.shared else columns == width)
    if fits and is_float(info.dtype):
        return []
    return [
        AdapterError(
            "the adapters' rotation does not fit this weight of the base",
            tensor=info.name,
            expected=f"{width} floating-point columns",
            found=f"{info.dtype} {list(info.shape)}",
            remedy="Give the base model that the adapters were trained on.",
        )
    ]


def _other_names(adapters: Sequence[OftAdapter]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.others))


def _rotate_task(
    method: MergeMethod,
    info: TensorInfo,
    module: MergedModule,
    base: TensorInfo | None,
    settings: Settings,
    draft: Draft,
) -> Task:
    problem = weight_sum_problem(method, settings, [True] * len(module.parts), info.name)
    draft.problems += [problem] if problem else []
    blocks = module.num_blocks * module.block_size**2 * 8
    peak = blocks * (len(module.parts) + _ALGEBRA_COPIES)
    if base is not None:
        row = math.prod(base.shape[1:])
        lifted = ITEM_SIZES[draft.compute_dtype]
        peak += max(draft.piece_elements, row) * (ITEM_SIZES[base.dtype] + 4 * lifted)
    read = sum(math.prod(module.packed_shape) * ITEM_SIZES[p.dtype] for p in module.parts if p)
    return Task(
        info=info,
        kind="rotate",
        models=tuple(part.name if part else None for part in module.parts),
        base=base.name if base else None,
        weights=settings.weights,
        parameters=settings.parameters,
        peak_bytes=peak,
        read_bytes=read + (base.nbytes if base else 0),
    )


def _copy_task(info: TensorInfo, models: tuple[str | None, ...], base: TensorInfo | None) -> Task:
    kind: TaskKind = "copy" if base is None or base.dtype == info.dtype else "convert"
    peak = 1 << 20
    name = base.name if base else None
    return Task(info, kind, models, name, (), {}, peak, info.nbytes)


def _other_task(
    request: MergeRequest,
    method: MergeMethod,
    output_name: str,
    name: str,
    adapters: Sequence[OftAdapter],
    layers: LayerMap,
    draft: Draft,
) -> list[Task]:
    """Average a whole tensor (a trained head or bias) over the adapters that carry it."""
    keys = tuple(adapter.others.get(name) for adapter in adapters)
    infos = [a.source.tensors[key] for a, key in zip(adapters, keys, strict=True) if key]
    if len({info.shape for info in infos}) > 1 or not all(is_float(info.dtype) for info in infos):
        draft.problems.append(
            AdapterError(
                "the adapters' copies of this tensor cannot be averaged",
                tensor=name,
                found=", ".join(f"{info.dtype} {list(info.shape)}" for info in infos),
                remedy="Merge adapters whose trained heads have one shape.",
            )
        )
        return []
    dtype = dtype_from_name(request.dtype) if request.dtype else infos[0].dtype
    weights = resolve_settings(
        request, method, layers_name(output_name, name, layers), layers
    ).weights
    peak = draft.piece_elements * 4 * (2 * len(infos) + 4)
    info = TensorInfo(output_name, dtype, infos[0].shape)
    read = sum(entry.nbytes for entry in infos)
    return [Task(info, "merge", keys, None, weights, {"normalize": True}, peak, read, _AVERAGE)]


def layers_name(output_name: str, name: str, layers: LayerMap) -> str:
    """Return the name under which rules and gradients know a tensor."""
    return output_name if output_name in layers.positions else name
