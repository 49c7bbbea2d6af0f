"""Make the projector of a run, with its bank over the retain set."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from orthomerge.unlearning.data import TokenisedSet, collate_rows
from orthomerge.unlearning.objectives import Objective
from orthomerge.unlearning.projection import RetainProjector
from orthomerge.unlearning.training.estimating import bank_rows
from orthomerge.unlearning.training.measuring import moved
from orthomerge.unlearning.training.preparing import PreparedSets
from orthomerge.unlearning.training.settings import UnlearnRequest

__all__ = ["make_projector"]


def make_projector(
    request: UnlearnRequest,
    sets: PreparedSets,
    model: Any,
    reference: Any,
    autocast: Callable[[], Any],
) -> RetainProjector | None:
    """Return the projector with its bank, or None where nothing is projected.

    The bank's groups are a seeded partition of as many retain rows as the request allows; each
    group's mean retain loss is one protected row.
    """
    if request.projection is None or sets.retain is None:
        return None
    projector = RetainProjector(model, **request.projection)
    count = bank_rows(request, sets)
    if count and "bank" in projector.settings.rows:
        order = random.Random(f"bank:{request.train.seed}").sample(range(len(sets.retain)), count)
        groups = min(projector.settings.bank_size, count)
        losses = _Losses(sets, request, model, reference, autocast)
        projector.set_bank([losses.over(sorted(order[start::groups])) for start in range(groups)])
    return projector


class _Losses:
    """Retain losses of chosen rows, batch by batch, with their numbers of scored tokens."""

    def __init__(
        self,
        sets: PreparedSets,
        request: UnlearnRequest,
        model: Any,
        reference: Any,
        autocast: Callable[[], Any],
    ) -> None:
        assert sets.retain is not None
        self._set: TokenisedSet = sets.retain
        self._objective: Objective = request.objective
        self._size = request.train.batch_size
        self._model, self._reference, self._autocast = model, reference, autocast
        self._collate = collate_rows(sets.pad_token_id)

    def over(self, rows: list[int]) -> Callable[[], Iterator[tuple[Any, float]]]:
        """Return a callable that yields (loss, weight) for these rows."""

        def losses() -> Iterator[tuple[Any, float]]:
            for start in range(0, len(rows), self._size):
                batch = self._collate([self._set[i] for i in rows[start : start + self._size]])
                whole = {"retain": moved(batch, self._model)}
                with self._autocast():
                    loss = self._objective.retain_loss(self._model, self._reference, whole)
                yield loss, float(self._objective.retain_count(whole))

        return losses
