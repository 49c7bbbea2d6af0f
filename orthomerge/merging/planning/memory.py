"""How much working memory a task of a merge needs, from headers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orthomerge.checkpoints.dtypes import ITEM_SIZES
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.merging.lora.frames import Lift, coordinate_shape, lift_of
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.nesting import nested_choices
from orthomerge.merging.plan import TaskKind
from orthomerge.merging.planning.draft import Draft
from orthomerge.merging.planning.views import View
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.roles import tensor_role

__all__ = ["SURVEY_SHARE", "base_bytes", "factors_bytes", "peak_bytes"]

_CORE = 8  # bytes of a float64
_TEMPORARIES = 8  # compute-dtype pieces a method may hold beside its inputs
SURVEY_SHARE = 0.05  # of a tensor's entries that a survey may collect


def peak_bytes(
    method: MergeMethod,
    kind: TaskKind,
    info: TensorInfo,
    pairs: Sequence[tuple[View, TensorInfo | None]],
    draft: Draft,
) -> int:
    """Return the working memory of one task of a merge of full weights."""
    used = [entry for _, entry in pairs if entry is not None]
    lifted = ITEM_SIZES[draft.compute_dtype]
    per_element = sum(ITEM_SIZES[entry.dtype] for entry in used)
    # An adapter's change is held whole, and so is the base's tensor while it is computed.
    changed = sum(view.changes is not None and entry is not None for view, entry in pairs)
    held = (changed + 2) * info.numel * lifted if changed else 0
    if kind == "whole":
        models = max(1, len(used) - 1)
        inputs = info.numel * (per_element + len(used) * lifted)
        return held + inputs + _workspace(method, info, models) * lifted
    piece = min(draft.piece_elements, max(info.numel, 1))
    if kind == "merge":
        per_element += (2 * len(used) + _TEMPORARIES) * lifted
    collected = 0
    if kind == "merge" and method.survey is not None:
        collected = int(SURVEY_SHARE * info.numel) * lifted
    return held + piece * per_element + collected


def factors_bytes(
    module: JoinedLora, method: MergeMethod, parameters: Mapping[str, Any], compute_dtype: str
) -> int:
    """Return the working memory of one task of a merge of low-rank factors.

    Factors that are merged as they are exist several times over while they are read, joined,
    multiplied, rounded; in coordinates or by nested methods in float64 as well.
    """
    rank, size = sum(module.ranks), module.rows + module.columns
    item = ITEM_SIZES[compute_dtype]
    alone = method.factors is not None and not nested_choices(method, parameters)
    held = size * rank * (8 if alone else 12) * item + 24 * rank**2 * _CORE
    return held + _coordinate_bytes(module, method, parameters, item)


def base_bytes(weight: TensorInfo, draft: Draft, *, turned: bool) -> int:
    """Return the working memory in which a module's weight is read from the base and changed.

    Args:
        weight: The weight.
        draft: The plan in the making.
        turned: Its columns are the output features: DoRA's norms need it whole.
    """
    whole = weight.numel * (ITEM_SIZES[weight.dtype] + 2 * ITEM_SIZES[draft.compute_dtype])
    pieces = 16 * _CORE * draft.piece_elements
    return whole + pieces if turned else min(whole, pieces)


def _coordinate_bytes(
    module: JoinedLora,
    method: MergeMethod,
    parameters: Mapping[str, Any],
    item: int,
    space: Lift | None = None,
) -> int:
    """Return what methods of task vectors hold that run on coordinates, this one or nested ones."""
    needed = 0
    if space or method.factors is None:
        models = len(module.parts)
        shape = coordinate_shape(module.rows, module.columns, sum(module.ranks), space or "knots")
        entries = math.prod(shape)
        own = method.workspace(shape, models) if method.workspace else (models + 3) * entries
        needed = models * entries * item + max(models * entries * _CORE, own * item)
    inner_space = None if method.lift is None else lift_of(method, parameters)
    for inner, given in nested_choices(method, parameters):
        needed += _coordinate_bytes(module, inner, given, item, inner_space)
    return needed


def _workspace(method: MergeMethod, info: TensorInfo, models: int) -> int:
    shape = info.shape
    if len(shape) < 2 or method.workspace is None:
        return _default_workspace(shape, models)
    if tensor_role(info.name, shape) == "stack":  # its matrices are worked on one by one
        return (models + 2) * info.numel + method.workspace(shape[1:], models)
    return method.workspace(shape, models)


def _default_workspace(shape: tuple[int, ...], models: int) -> int:
    return 4 * (models + 1) * math.prod(shape)
