"""See every source as a full model by the base's tensor names: what it changes, what it leaves.

Headers only. A full checkpoint is its own view; an adapter's view is the base with its changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.folder import is_tied, read_config
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import OrthoMergeError, ProblemsError

if TYPE_CHECKING:
    from orthomerge.adapters.updates import AdapterUpdates

__all__ = ["View", "open_views"]


@dataclass(frozen=True)
class View:
    """A source as a full model.

    Args:
        source: The opened source.
        tensors: Its tensors by the base's names; of an adapter, the base's with its changes.
        changes: What an adapter changes; None for a full checkpoint.
    """

    source: Source
    tensors: Mapping[str, TensorInfo]
    changes: AdapterUpdates | None = None

    @property
    def origin(self) -> str:
        """Where it came from, as the user wrote it."""
        return self.source.origin

    def touches(self, name: str) -> bool:
        """Return whether the model's tensor may differ from the base's."""
        changes = self.changes
        return changes is None or name in changes.updates or name in changes.replacements

    def read_bytes(self, name: str) -> int:
        """Return how many bytes of the source a merge of this tensor reads."""
        if self.changes is None:
            return self.tensors[name].nbytes
        update = self.changes.updates.get(name)
        if update is not None:
            return update.read_bytes + (self.tensors[name].nbytes if update.needs_base else 0)
        return self.tensors[name].nbytes if name in self.changes.replacements else 0


def open_views(
    models: Sequence[Source],
    base: Source | None,
    problems: list[OrthoMergeError],
    *,
    kept_head: int | None = None,
) -> list[View]:
    """Return one view per model; what is wrong with adapters goes to ``problems``.

    Args:
        models: The models.
        base: What adapters change.
        problems: What is wrong is added here.
        kept_head: Position of the model whose whole tensors take the place of the others'.
    """
    views = []
    for at, model in enumerate(models):
        if model.kind == "full" or base is None:
            views.append(View(model, model.checkpoint.tensors))
            continue
        try:
            kept = None if kept_head in (None, at) else models[kept_head]
            views.append(_adapter_view(model, base, kept))
        except ProblemsError as error:
            problems.extend(error.problems)
        except OrthoMergeError as error:
            problems.append(error)
    return views


def _adapter_view(model: Source, base: Source, kept: Source | None) -> View:
    from orthomerge.adapters.updates import adapter_updates

    tied = is_tied(read_config(base.checkpoint.folder))
    adapter = kept and (kept.lora or kept.rotations)
    dropped = adapter.others if adapter else ()
    changes = adapter_updates(model, base.checkpoint.tensors, tied=tied, dropped=dropped)
    own = model.checkpoint.tensors
    tensors = dict(base.checkpoint.tensors)
    for name, key in changes.replacements.items():
        tensors[name] = replace(own[key], name=name)
    return View(model, tensors, changes)
