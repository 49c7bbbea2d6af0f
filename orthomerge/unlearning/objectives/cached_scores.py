"""The starting model's sequence losses of every row, computed once before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from orthomerge.errors import RecipeError, UnknownNameError
from orthomerge.unlearning.objectives.forwards import forward_logits, without_wrappers
from orthomerge.unlearning.objectives.reference import reference_pass
from orthomerge.unlearning.objectives.scores import IGNORED, sequence_losses

__all__ = ["CachedScores", "Rows"]


class Rows(Protocol):
    """A tokenised set: ``[i]`` gives ``input_ids`` and ``labels`` of row i as lists of numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Sequence[int]]: ...


class CachedScores:
    """S^ref of every row of some sets, looked up by the set's name and the row's number.

    No second model and no second pass; the order of the rows in a batch does not matter. A row is
    recognised by a checksum of its tokens, so that scores of other data are never used.

    Args:
        model: The starting model.
        sets: The sets by the name of the batch they come in: ``forget``, ``alternate``.
        batch_size: Rows per pass.
    """

    def __init__(self, model: Any, sets: Mapping[str, Rows], *, batch_size: int = 8) -> None:
        self._scores: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        inner = without_wrappers(model)
        with reference_pass(inner):
            for name, rows in sets.items():
                self._scores[name], self._sums[name] = _scores(inner, rows, batch_size)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """Return what ``state_dict`` saved: a resumed run needs the scores of the start."""
        cached = cls.__new__(cls)
        cached._scores, cached._sums = {}, {}
        for key, values in state.items():
            kind, _, name = key.partition(".")
            {"scores": cached._scores, "checksums": cached._sums}[kind][name] = values.cpu().clone()
        return cached

    def state_dict(self) -> dict[str, Tensor]:
        """Return the scores and checksums of every set, on the CPU."""
        scores = {f"scores.{name}": values.clone() for name, values in self._scores.items()}
        return scores | {f"checksums.{name}": sums.clone() for name, sums in self._sums.items()}

    def scores(self, batch: Mapping[str, Tensor], *, part: str = "forget") -> Tensor:
        """Return S^ref [B] of the batch's rows.

        Raises:
            UnknownNameError: No scores of this set.
            RecipeError: The rows are not those that were scored.
        """
        if part not in self._scores:
            raise UnknownNameError("set of cached scores", part, self._scores)
        known, rows = self._sums[part], batch["row"].cpu()
        inside = (rows >= 0) & (rows < len(known))
        same = inside & (known[rows.where(inside, 0)] == _checksums(batch).cpu())
        if not bool(same.all()):
            raise RecipeError(
                f"row {int(rows[~same][0])} of the {part} set is not the one that was scored",
                remedy="Compute the scores again with the sets of this run.",
            )
        return self._scores[part][rows].to(batch["labels"].device)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Refuse: only scores are kept."""
        raise self._refusal("logits")

    def hidden(self, batch: Mapping[str, Tensor], layer: int | None) -> Tensor:
        """Refuse: only scores are kept."""
        raise self._refusal("hidden states")

    def _refusal(self, what: str) -> RecipeError:
        problem = f"cached scores do not hold the starting model's {what}"
        return RecipeError(problem, remedy="Use AdapterOff or FrozenCopy.")


def _scores(model: Any, rows: Rows, batch_size: int) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    scores, sums = [], []
    for start in range(0, len(rows), batch_size):
        items = [rows[place] for place in range(start, min(start + batch_size, len(rows)))]
        batch = {name: values.to(device) for name, values in _padded(items).items()}
        values, _ = sequence_losses(forward_logits(model, batch), batch["labels"])
        scores.append(values.cpu())
        sums.append(_checksums(batch).cpu())
    empty = torch.zeros(0)
    return torch.cat(scores or [empty]), torch.cat(sums or [empty.long()])


def _padded(items: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Join rows, padded on the right; which token pads does not matter, it is masked."""
    length = max(len(item["input_ids"]) for item in items)

    def joined(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])

    return {
        "input_ids": joined([item["input_ids"] for item in items], 0),
        "attention_mask": joined([[1] * len(item["input_ids"]) for item in items], 0),
        "labels": joined([item["labels"] for item in items], IGNORED),
    }


def _checksums(batch: Mapping[str, Tensor]) -> Tensor:
    """Return one number per row [B] that depends on its tokens, their places and their labels."""
    ids, labels = batch["input_ids"].long(), batch["labels"].long()
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    tokens = (ids + 1) * places * places * (batch["attention_mask"] != 0)
    scored = (labels + 1) * (places * places + 7919) * (labels != IGNORED)
    return (tokens + 3 * scored).sum(-1)
