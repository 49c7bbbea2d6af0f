"""Measure how well a model predicts the rows of a set; no gradient, no training, no decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthomerge.errors import NumericalError
from orthomerge.unlearning.data import TokenisedSet, collate_rows
from orthomerge.unlearning.objectives import sequence_losses
from orthomerge.unlearning.objectives.reference import reference_pass

if TYPE_CHECKING:
    from orthomerge.unlearning.training.settings import StopSettings

__all__ = ["SetScores", "moved", "rows_measured", "score_rows"]


@dataclass(frozen=True)
class SetScores:
    """Loss of every row, nats.

    Attributes:
        total: Summed over the row's scored tokens [rows], float64.
        tokens: Number of scored tokens [rows].
    """

    total: Tensor
    tokens: Tensor

    @property
    def losses(self) -> Tensor:
        """Loss per token of every row."""
        return self.total / self.tokens

    @property
    def loss(self) -> float:
        """Mean over rows of the loss per token."""
        return float(self.losses.mean())

    @property
    def deviation(self) -> float:
        """Standard deviation of the rows' losses per token; 0 for a single row."""
        return float(self.losses.std()) if len(self.losses) > 1 else 0.0

    @property
    def probability(self) -> float:
        """Mean over rows of ``exp(-loss per token)``, the length-normalised probability."""
        return float(torch.exp(-self.losses).mean())

    def of_batch(self, rows: Tensor) -> float:
        """Return the loss per token of a batch of rows, as a token mean."""
        rows = rows.cpu()
        return float(self.total[rows].sum() / self.tokens[rows].sum())


def score_rows(
    model: Any,
    data: TokenisedSet,
    *,
    pad_token_id: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> SetScores:
    """Return the loss of every row of a set under a model, in evaluation mode.

    Args:
        model: A causal language model.
        data: The set.
        pad_token_id: What shorter rows are filled up with.
        batch_size: Rows at once.
        rows: Which rows; all by default.
        autocast: Makes the context of a forward pass, for mixed precision.

    Raises:
        NumericalError: A row's loss is not finite.
    """
    collate = collate_rows(pad_token_id)
    chosen = list(range(len(data))) if rows is None else list(rows)
    totals, counts = [], []
    with reference_pass(model):
        for start in range(0, len(chosen), batch_size):
            batch = collate([data[row] for row in chosen[start : start + batch_size]])
            inputs = moved(batch, model)
            with autocast():
                logits = model(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    use_cache=False,
                ).logits
            S, n = sequence_losses(logits, inputs["labels"])
            totals.append(S.double().cpu())
            counts.append(n.cpu())
    scores = SetScores(torch.cat(totals), torch.cat(counts))
    bad = (~torch.isfinite(scores.total)).nonzero().flatten()
    if len(bad):
        raise NumericalError(
            f"the model gives row {chosen[int(bad[0])]} of the {data.name} set a loss that is not "
            "finite",
            remedy="Check the model's weights, and its precision: fp16 may overflow.",
        )
    return scores


def rows_measured(data: TokenisedSet, stop: StopSettings) -> list[int]:
    """Return which rows of a set are measured during training: ``stop.rows``, evenly spread."""
    count, most = len(data), min(len(data), stop.rows)
    return [position * count // most for position in range(most)]


def moved(batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return a batch of rows where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
