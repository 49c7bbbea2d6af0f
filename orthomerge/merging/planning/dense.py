"""Plan the merge of full checkpoints: which tensors go together, and what becomes of the rest.

Headers only. Tied output heads are recognised here, so that they are merged once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.dtypes import dtype_from_name
from orthomerge.checkpoints.folder import is_tied, read_config, tied_alias
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import OrthoMergeError, RecipeError, TensorMismatchError
from orthomerge.merging.plan import MERGED_KINDS, MergeRequest, Task, TaskKind
from orthomerge.merging.planning.agreement import absent_problems, base_problems
from orthomerge.merging.planning.carried import chosen_heads
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
from orthomerge.merging.planning.factored import factored_task, joined_updates
from orthomerge.merging.planning.files import add_model_files
from orthomerge.merging.planning.memory import peak_bytes
from orthomerge.merging.planning.model_scope import check_model_survey
from orthomerge.merging.planning.views import View, open_views
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.roles import tensor_role
from orthomerge.merging.rules import LayerMap
from orthomerge.merging.spaces import Space

__all__ = ["draft_tasks"]


def draft_tasks(
    request: MergeRequest, method: MergeMethod, models: Sequence[Source], base: Source | None
) -> Draft:
    """Return the tasks of a merge of full checkpoints, with everything that is wrong with them."""
    draft = Draft(piece_elements=piece_elements(request))
    sources = [*([base] if base else []), *models]
    stored = [info.dtype for source in sources for info in source.checkpoint.tensors.values()]
    draft.compute_dtype = compute_dtype(request, stored)
    views = open_views(models, base, draft.problems, kept_head=request.kept_head)
    if draft.problems:
        return draft
    draft.changes = tuple(view.changes for view in views)
    draft.problems += base_problems(request, [m.lora for m in models if m.lora is not None])
    if base is not None:
        views.insert(0, View(base, base.checkpoint.tensors))
    tied = _resolve_tie([v.source for v in views if v.changes is None], draft)
    rows = _align(request, views, tied, draft, base is not None)
    layers = LayerMap.of(rows)
    draft.problems += rule_problems(request, method, rows)
    for name, row in rows.items():
        draft.tasks += _draft_task(request, method, name, row, views, layers, draft)
    if method.space is Space.FACTORS:
        draft.problems += absent_problems(request, joined_updates(views))
    check_model_survey(request, method, draft)
    add_model_files(sources[0], draft)
    return draft


@dataclass(frozen=True)
class _Row:
    """One output tensor: its entry in every source, in the order base, models."""

    entries: tuple[TensorInfo | None, ...]

    @property
    def donor(self) -> TensorInfo:
        return next(entry for entry in self.entries if entry is not None)

    @property
    def complete(self) -> bool:
        return None not in self.entries


def _resolve_tie(sources: Sequence[Source], draft: Draft) -> tuple[str, str] | None:
    """Return (head, embedding) if the output is tied or some source is, else None.

    The donor decides how the output is written: tied if its config says so or its head is absent.
    """
    names = {name for source in sources for name in source.checkpoint.tensors}
    pair = tied_alias(names)
    if pair is None or pair[0] not in names:
        return None
    head, embedding = pair
    untied = [source.origin for source in sources if _owns_head(source, head)]
    donor_tied = not _owns_head(sources[0], head)
    if donor_tied and untied:
        draft.problems.append(
            TensorMismatchError(
                "has an output head of its own, the donor's is tied to its embeddings",
                file=untied[0],
                tensor=head,
                remedy=f"Untie {sources[0].origin} first, or merge models of one kind.",
            )
        )
    if donor_tied:
        draft.notes.append(f"{head} is tied to {embedding}: merged once and written once")
    elif len(untied) < len(sources):
        draft.notes.append(f"{head} is untied: tied models contribute {embedding}")
    return pair


def _owns_head(source: Source, head: str) -> bool:
    present = head in source.checkpoint.tensors
    return present and not is_tied(read_config(source.checkpoint.folder))


def _align(
    request: MergeRequest,
    views: Sequence[View],
    tied: tuple[str, str] | None,
    draft: Draft,
    has_base: bool,
) -> dict[str, _Row]:
    """Match tensors by name; deal with the missing ones as the policy says."""
    names = list(dict.fromkeys(name for view in views for name in view.tensors))
    rows: dict[str, _Row] = {}
    for name in names:
        if tied and name == tied[0] and not _owns_head(views[0].source, name):
            continue
        row = _Row(tuple(_entry(view, name, tied) for view in views))
        if has_base and not any(view.touches(name) for view in views[1:]):
            rows[name] = _Row((row.entries[0], *(None for _ in views[1:])))
        elif row.complete:
            rows[name] = row
        elif request.missing == "copy-base" and row.entries[0] is not None:
            rows[name] = _Row((row.entries[0], *(None for _ in row.entries[1:])))
            draft.notes.append(f"{name} is not in every model: copied from {views[0].origin}")
        elif request.missing == "skip":
            draft.notes.append(f"{name} is not in every model: left out")
        else:
            draft.problems.append(_missing_problem(name, row, views))
    return rows


def _entry(view: View, name: str, tied: tuple[str, str] | None) -> TensorInfo | None:
    tensors = view.tensors
    if name not in tensors and tied and name == tied[0]:
        config = read_config(view.source.checkpoint.folder)
        if config is None or config.get("tie_word_embeddings") is not False:
            return tensors.get(tied[1])
    return tensors.get(name)


def _missing_problem(name: str, row: _Row, views: Sequence[View]) -> OrthoMergeError:
    without = [v.origin for v, entry in zip(views, row.entries, strict=True) if entry is None]
    remedy = (
        "The first source lacks it, so only --missing skip can handle it."
        if row.entries[0] is None
        else "Pass --missing copy-base to take it from the base (else the first model) "
        "or --missing skip to leave it out."
    )
    return TensorMismatchError("is missing", file=", ".join(without), tensor=name, remedy=remedy)


def _draft_task(
    request: MergeRequest,
    method: MergeMethod,
    name: str,
    row: _Row,
    views: Sequence[View],
    layers: LayerMap,
    draft: Draft,
) -> list[Task]:
    has_base = len(views) > len(request.models)
    present = [entry for entry in row.entries if entry is not None]
    floating = all(is_float(entry.dtype) for entry in present)
    if not floating and len({entry.dtype for entry in present}) > 1:
        draft.problems.append(_dtype_problem(name, row))
        return []
    wanted = dtype_from_name(request.dtype) if request.dtype and floating else row.donor.dtype
    kept = _kept_head(request, name, wanted, views, draft)
    if kept is not None:
        return [kept]
    if len({entry.shape for entry in present}) > 1:
        draft.problems.append(_shape_problem(name, row, views))
        return []
    info = TensorInfo(name, wanted, row.donor.shape)
    settings = resolve_settings(request, method, name, layers)
    relative = _reads_base(request, method, views)
    kind = _task_kind(method, row, info, settings, relative)
    entries = row.entries
    if row.complete and floating:
        models = entries[1:] if has_base else entries
        problem = weight_sum_problem(method, settings, [True] * len(models), name)
        if problem and kind in MERGED_KINDS:
            draft.report_once(problem)
        if has_base and not relative:
            entries = (None, *models)
    if kind == "whole" and method.unfit is not None:
        unfit = method.unfit(info.shape, tensor_role(name, info.shape), settings.parameters)
        if unfit:
            draft.report_once(RecipeError(unfit, tensor=name))
    if kind in ("copy", "convert"):  # an adapter that leaves a tensor alone does not hold it
        entries = tuple(e if v.touches(name) else None for v, e in zip(views, entries, strict=True))
    pairs = list(zip(views, entries, strict=True))
    read = sum(view.read_bytes(entry.name) for view, entry in pairs if entry is not None)
    names = tuple(entry.name if entry else None for entry in entries)
    task = Task(
        info=info,
        kind=kind,
        models=names[1:] if has_base else names,
        base=names[0] if has_base else None,
        weights=settings.weights,
        parameters=settings.parameters,
        peak_bytes=peak_bytes(method, kind, info, pairs, draft),
        read_bytes=read,
    )
    if method.space is Space.FACTORS:
        task = factored_task(request, task, method, views, draft)
    return [task]


def _kept_head(
    request: MergeRequest, name: str, dtype: str, views: Sequence[View], draft: Draft
) -> Task | None:
    """Return the task of a whole tensor of several adapters of which one is kept, else None.

    The others' shapes do not matter.
    """
    models = views[len(views) - len(request.models) :]
    carried = tuple(v.changes.replacements.get(name) if v.changes else None for v in models)
    keys = chosen_heads(request, name, carried, [view.origin for view in models], draft)
    if keys == carried or not any(keys):
        return None
    view, key = next((v, k) for v, k in zip(models, keys, strict=True) if k)
    stored = view.source.checkpoint.tensors[key]
    kind: TaskKind = "copy" if stored.dtype == dtype else "convert"
    info = TensorInfo(name, dtype, stored.shape)
    return Task(info, kind, keys, None, (), {}, 1 << 20, stored.nbytes)


def _task_kind(
    method: MergeMethod, row: _Row, info: TensorInfo, settings: Settings, relative: bool
) -> TaskKind:
    """Return how a tensor is made: merged, or taken over from one source as it is or converted."""
    if not is_float(info.dtype):
        return "copy"  # and the sources must agree
    unscaled = method.name == "passthrough" and settings.parameters["scale"] == 1.0
    as_it_is = row.complete and unscaled and not relative
    if as_it_is or not row.complete:
        source = row.entries[-1] if as_it_is else row.donor
        return "copy" if source is not None and source.dtype == info.dtype else "convert"
    return "whole" if method.whole else "merge"


def _reads_base(request: MergeRequest, method: MergeMethod, views: Sequence[View]) -> bool:
    """A method of whole weights looks at the base only where something is relative to it."""
    relative = request.norm_matched is not None or any(view.changes for view in views)
    return method.space is not Space.WEIGHT or relative


def _shape_problem(name: str, row: _Row, views: Sequence[View]) -> OrthoMergeError:
    shapes = [
        f"{list(entry.shape) if entry else 'missing'} in {view.origin}"
        for entry, view in zip(row.entries, views, strict=True)
    ]
    vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight", "word_embeddings.weight"))
    return TensorMismatchError(
        "the shapes differ",
        tensor=name,
        found=", ".join(map(str, shapes)),
        remedy="The vocabularies differ: bring the models to one tokenizer first."
        if vocabulary
        else "Only models of one architecture and size can be merged.",
    )


def _dtype_problem(name: str, row: _Row) -> OrthoMergeError:
    dtypes = [entry.dtype if entry else "missing" for entry in row.entries]
    return TensorMismatchError(
        "integer and floating tensors cannot be merged",
        tensor=name,
        found=", ".join(dtypes),
        remedy="Dequantise the checkpoints first.",
    )
