"""Choose how the starting model is kept, from what an objective needs of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from orthomerge.errors import AdapterError
from orthomerge.unlearning.objectives.cached_scores import CachedScores, Rows
from orthomerge.unlearning.objectives.forwards import without_wrappers
from orthomerge.unlearning.objectives.reference import AdapterOff, FrozenCopy, Reference
from orthomerge.unlearning.objectives.registry import Need

__all__ = ["reference_for"]

_OF_REFERENCE = {Need.REFERENCE_SCORES, Need.REFERENCE_LOGITS, Need.REFERENCE_HIDDEN}


def reference_for(
    model: Any,
    needs: Collection[Need],
    *,
    sets: Mapping[str, Rows] | None = None,
    batch_size: int = 8,
) -> Reference | None:
    """Return the cheapest reference that gives what is needed.

    The model with its adapter off, if that is the starting model; else scores computed now, if
    scores are all that is needed; else a copy of what is trained.

    Args:
        model: The model before it is trained, and before a checkpoint of this run is loaded.
        needs: ``objective.needs``.
        sets: The forget set and, if the objective needs alternates, theirs; for scores.
        batch_size: Rows per pass when scores are computed.

    Returns:
        The reference; None where nothing of it is needed.
    """
    asked = _OF_REFERENCE & set(needs)
    if not asked:
        return None
    if hasattr(without_wrappers(model), "disable_adapter"):
        try:
            return AdapterOff(model)
        except AdapterError:
            pass  # the adapter is not new: the next ways work for any model
    if asked == {Need.REFERENCE_SCORES} and sets is not None:
        return CachedScores(model, sets, batch_size=batch_size)
    return FrozenCopy(model)
