"""Plan what becomes of the whole tensors that adapters carry beside their own parameters.

These are trained heads and biases (``modules_to_save``) and copies of embeddings; without the base
they cannot be merged as changes, so they are averaged, or one adapter's are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orthomerge.adapters.lora import LoraAdapter
from orthomerge.adapters.rotated import RotationAdapter
from orthomerge.checkpoints.dtypes import dtype_from_name
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import AdapterError, RecipeError
from orthomerge.merging.plan import MergeRequest, Task, TaskKind
from orthomerge.merging.planning.draft import Draft, is_float, resolve_settings
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.rules import LayerMap

__all__ = ["carried_names", "carried_task", "chosen_heads", "copy_task", "mean_weights"]

_AVERAGE = "linear"
_Adapter = RotationAdapter | LoraAdapter


def carried_names(adapters: Sequence[_Adapter]) -> list[str]:
    """Return the names of all whole tensors that adapters carry."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.others))


def copy_task(info: TensorInfo, models: tuple[str | None, ...], base: TensorInfo | None) -> Task:
    """Return the task that takes a tensor over as it is, or in another dtype."""
    kind: TaskKind = "copy" if base is None or base.dtype == info.dtype else "convert"
    peak = 1 << 20
    name = base.name if base else None
    return Task(info, kind, models, name, (), {}, peak, info.nbytes)


def carried_task(
    request: MergeRequest,
    method: MergeMethod,
    info: TensorInfo,
    name: str,
    adapters: Sequence[_Adapter],
    layers: LayerMap,
    draft: Draft,
) -> list[Task]:
    """Average a whole tensor over the adapters that carry it, or keep one of them."""
    carried = tuple(adapter.others.get(name) for adapter in adapters)
    keys = chosen_heads(request, name, carried, [adapter.origin for adapter in adapters], draft)
    if not any(keys):
        return []
    if keys != carried:  # one is kept, whatever the shape of the others
        kept = next(a.source.tensors[k] for a, k in zip(adapters, keys, strict=True) if k)
        info = replace(kept, name=info.name)
    infos = [a.source.tensors[key] for a, key in zip(adapters, keys, strict=True) if key]
    shapes = {entry.shape for entry in [info, *infos]}
    if len(shapes) > 1 or not all(is_float(entry.dtype) for entry in infos):
        draft.problems.append(
            AdapterError(
                "the adapters' copies of this tensor cannot be averaged",
                tensor=name,
                found=", ".join(f"{entry.dtype} {list(entry.shape)}" for entry in infos),
                remedy="Keep those of one model with --heads keep:N, or merge adapters whose "
                "trained heads have one shape.",
            )
        )
        return []
    dtype = dtype_from_name(request.dtype) if request.dtype else info.dtype
    known = info.name if info.name in layers.positions else name
    given = resolve_settings(request, method, known, layers).weights
    weights = mean_weights(given, [key is not None for key in keys], name, draft)
    peak = draft.piece_elements * 4 * (2 * len(infos) + 4)
    read = sum(entry.nbytes for entry in infos)
    out = TensorInfo(info.name, dtype, info.shape)
    return [Task(out, "merge", keys, None, weights, {"normalize": True}, peak, read, _AVERAGE)]


def mean_weights(
    weights: tuple[float, ...], present: Sequence[bool], name: str, draft: Draft
) -> tuple[float, ...]:
    """Return the weights of the mean of a whole tensor, and report those that have no mean.

    A tensor that one adapter carries is its own mean, whatever that adapter's weight.
    """
    taking_part = [weight for weight, here in zip(weights, present, strict=True) if here]
    if len(taking_part) < 2:
        return (1.0,) * len(weights)
    if abs(sum(taking_part)) <= 1e-9 * max(map(abs, taking_part)):
        draft.report_once(
            RecipeError(
                "trained heads have no mean under weights that sum to zero",
                tensor=name,
                found=", ".join(f"{weight:g}" for weight in taking_part),
                remedy="Keep those of one model with --heads keep:N, or change the weights.",
            )
        )
    return weights


def chosen_heads(
    request: MergeRequest,
    name: str,
    carried: tuple[str | None, ...],
    origins: Sequence[str],
    draft: Draft,
) -> tuple[str | None, ...]:
    """Return which models' copies of a whole tensor take part: all, the kept one, or none.

    Args:
        request: What was asked.
        name: Name of the tensor.
        carried: Name of each model's copy; None for a model that has none.
        origins: The models, for messages.
        draft: Where it is reported if several copies are refused.
    """
    if sum(key is not None for key in carried) < 2:
        return carried
    if request.heads == "error":
        holders = [origin for origin, key in zip(origins, carried, strict=True) if key]
        draft.report_once(
            AdapterError(
                "several adapters carry a whole tensor of their own here",
                tensor=name,
                found=", ".join(holders),
                remedy="Average them with --heads average, or keep those of model N with "
                "--heads keep:N.",
            )
        )
        return (None,) * len(carried)
    kept = request.kept_head
    if kept is None or carried[kept] is None:
        return carried
    return tuple(key if at == kept else None for at, key in enumerate(carried))
