"""How much working memory a task of a merge of full weights needs, from headers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orthomerge.checkpoints.dtypes import ITEM_SIZES
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.plan import TaskKind
from orthomerge.merging.planning.draft import Draft
from orthomerge.merging.planning.views import View
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.roles import tensor_role

__all__ = ["SURVEY_SHARE", "factors_bytes", "peak_bytes"]

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


def factors_bytes(module: JoinedLora, method: MergeMethod, compute_dtype: str) -> int:
    """Return the working memory of one task of a merge of low-rank factors."""
    rank, size = sum(module.ranks), module.rows + module.columns
    copies = 4 if method.factors is not None else 8  # coordinates are made and merged in fp64
    return (size * rank * copies + 12 * rank**2) * ITEM_SIZES[compute_dtype]


def _workspace(method: MergeMethod, info: TensorInfo, models: int) -> int:
    shape = info.shape
    if len(shape) < 2 or method.workspace is None:
        return _default_workspace(shape, models)
    if tensor_role(info.name, shape) == "stack":  # its matrices are worked on one by one
        return (models + 2) * info.numel + method.workspace(shape[1:], models)
    return method.workspace(shape, models)


def _default_workspace(shape: tuple[int, ...], models: int) -> int:
    return 4 * (models + 1) * math.prod(shape)
