"""Try the projection on a run's own model with its first two batches; nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orthomerge.errors import RecipeError
from orthomerge.quiet import quiet_libraries
from orthomerge.unlearning.data import collate
from orthomerge.unlearning.training.measuring import moved
from orthomerge.unlearning.training.preparing import PreparedSets
from orthomerge.unlearning.training.settings import UnlearnRequest

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.unlearning.projection import Checkup
    from orthomerge.unlearning.training.sessions import Session

__all__ = ["check_run"]


def check_run(request: UnlearnRequest, sets: PreparedSets) -> Checkup:
    """Measure on a run's model whether projected steps leave the retain loss alone.

    Raises:
        RecipeError: There is no retain set.
        NumericalError: The projection does not do what it promises on this model.
    """
    from orthomerge.unlearning.projection import check_projection
    from orthomerge.unlearning.training.sessions import Session

    if sets.retain is None:
        raise RecipeError("the projection is tried on a retain set", remedy="Give --retain.")
    with quiet_libraries():
        session = Session(request, sets)
    model, objective = session.model.eval(), request.objective
    batch = _first_batch(session)

    def loss(part: str) -> Any:
        def value() -> Any:
            with session.autocast():
                method = objective.forget_loss if part == "forget" else objective.retain_loss
                return method(model, session.reference, batch)

        return value

    scope = None if request.projection is None else request.projection.get("scope")
    return check_projection(model, loss("forget"), loss("retain"), scope=scope)


def _first_batch(session: Session) -> dict[str, dict[str, Tensor]]:
    pairs = session.pairs()
    count = min(session.request.train.batch_size, len(pairs))
    batch = collate(session.sets.pad_token_id)([pairs[i] for i in range(count)])
    return {part: moved(rows, session.model) for part, rows in batch.items()}
