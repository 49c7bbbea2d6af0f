"""Pair forget rows with retain rows, so that the whole retain set is used evenly.

Nothing is drawn while training runs: what item i of epoch e holds depends on these two numbers and
the seed alone, so that resuming, several workers and several processes change nothing.
"""

from __future__ import annotations

import random
from typing import Any

from orthomerge.errors import DataError, RecipeError
from orthomerge.unlearning.data.tokenised import TokenisedSet

__all__ = ["PairedRows"]


class PairedRows:
    """A map-style data set of forget rows, each with its retain rows.

    Think of an endless stream of retain rows: one seeded permutation of the set behind the other.
    Item i of epoch e takes places ``(e n + i) k, …, (e n + i) k + k - 1`` of it, with n forget rows
    and k retain rows per forget row. So over consecutive items every retain row is used before any
    is used again, across epochs too, whichever set is the longer one.

    Args:
        forget: The forget set; its length is the length of this one.
        retain: The retain set, or None.
        seed: Of the permutations.
        alternate: Row i answers forget row i otherwise; the same length as ``forget``.
        retain_per_forget: k.

    Raises:
        DataError: A set is empty, or ``alternate`` is of another length.
        RecipeError: ``retain_per_forget`` is below 1.
    """

    def __init__(
        self,
        forget: TokenisedSet,
        retain: TokenisedSet | None,
        *,
        seed: int,
        alternate: TokenisedSet | None = None,
        retain_per_forget: int = 1,
    ) -> None:
        import torch

        for one in (forget, retain):
            if one is not None and len(one) == 0:
                raise DataError(f"the {one.name} set is empty")
        if alternate is not None and len(alternate) != len(forget):
            raise DataError(
                "every forget row needs one alternate", expected=len(forget), found=len(alternate)
            )
        if retain_per_forget < 1:
            raise RecipeError(
                "there must be a retain row per forget row",
                expected=">= 1",
                found=retain_per_forget,
            )
        self.forget, self.retain, self.alternate = forget, retain, alternate
        self._seed, self._per_item = seed, retain_per_forget
        # Shared, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._passes: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        item: dict[str, Any] = {"forget": self.forget[index]}
        if self.retain is not None:
            item["retain"] = [self.retain[row] for row in self.retain_rows(index)]
        if self.alternate is not None:
            item["alternate"] = self.alternate[index]
        return item

    @property
    def epoch(self) -> int:
        """The epoch that items are of, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; call it before the loader of the epoch is iterated."""
        self._epoch.fill_(epoch)

    def retain_rows(self, index: int) -> list[int]:
        """Return which retain rows item ``index`` of this epoch is paired with."""
        if self.retain is None:
            return []
        start = (self.epoch * len(self) + range(len(self))[index]) * self._per_item
        return [self._at(place) for place in range(start, start + self._per_item)]

    def _at(self, place: int) -> int:
        """Return which retain row is at a place of the stream."""
        assert self.retain is not None
        number, offset = divmod(place, len(self.retain))
        if number not in self._passes:
            self._forget_old_passes()
            self._passes[number] = self._permutation(number)
        return self._passes[number][offset]

    def _permutation(self, number: int) -> list[int]:
        # Python promises this stream for a seed given as text, on every version and machine.
        assert self.retain is not None
        draws = random.Random(f"{self._seed}:{number}")
        keys = [draws.random() for _ in range(len(self.retain))]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _forget_old_passes(self) -> None:
        """Keep only the permutations of this epoch, which a shuffled loader needs at random."""
        assert self.retain is not None
        begin = self.epoch * len(self) * self._per_item // len(self.retain)
        end = (self.epoch + 1) * len(self) * self._per_item // len(self.retain)
        self._passes = {
            number: rows for number, rows in self._passes.items() if begin <= number <= end
        }
