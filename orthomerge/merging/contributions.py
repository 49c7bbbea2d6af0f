"""What one model contributes to one weight, whatever the model is: its weight, or its change.

A full checkpoint contributes the difference from the base, an adapter the change it makes; both are
read in flat pieces of the compute dtype, and no adapter's weight is ever rounded on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from orthomerge.merging.streams import TensorReader, check_finite

if TYPE_CHECKING:
    from orthomerge.adapters.updates import WeightUpdate

__all__ = ["Contribution", "FullWeight", "NoChange", "UpdatedWeight"]


class Contribution(Protocol):
    """One model's part in one merged tensor."""

    def weight(self, start: int, count: int) -> Tensor:
        """Return ``count`` elements of W_i from a flat index on, checked to be finite."""

    def delta(self, start: int, count: int) -> Tensor:
        """Return the same elements of W_i - W_0."""

    def digests(self) -> list[tuple[str, str]]:
        """Return what was read, tensor by tensor: its name and the digest of its bytes."""


class FullWeight:
    """A tensor of a full checkpoint, or one that an adapter carries whole.

    Args:
        name: Its name in the checkpoint.
        reader: The tensor.
        base: The base's tensor.
    """

    def __init__(self, name: str, reader: TensorReader, base: TensorReader | None) -> None:
        self._name, self._reader, self._base = name, reader, base

    def weight(self, start: int, count: int) -> Tensor:
        """Return a piece of the tensor."""
        return self._reader.piece(start, count)

    def delta(self, start: int, count: int) -> Tensor:
        """Return a piece of the tensor's difference from the base, made in the reader's piece."""
        assert self._base is not None
        origin = self._base.kept(start, count)
        delta = self._reader.unchecked(start, count).sub_(origin)
        if not math.isfinite(delta.sum().item()):  # whenever one of the two holds NaN or infinity
            self._base.check(origin)
            self._reader.check(delta + origin)
        return delta

    def digests(self) -> list[tuple[str, str]]:
        """Return the tensor's digest."""
        digest = self._reader.digest()
        return [(self._name, digest)] if digest else []


class UpdatedWeight:
    """A weight that an adapter changes; the change is held in memory.

    Args:
        update: What the adapter does to it.
        change: W_i - W_0 in the compute dtype.
        base: The base's tensor.
        origin: The adapter, for messages.
        digests: What was read of the adapter.
    """

    def __init__(
        self,
        update: WeightUpdate,
        change: Tensor,
        base: TensorReader,
        origin: str,
        digests: Mapping[str, str],
    ) -> None:
        check_finite(change, origin, update.keys[0], "the adapter")
        self._change, self._base, self._digests = change.reshape(-1), base, digests

    def weight(self, start: int, count: int) -> Tensor:
        """Return a piece of W_0 plus the change."""
        return self._base.kept(start, count) + self._change[start : start + count]

    def delta(self, start: int, count: int) -> Tensor:
        """Return a piece of the change."""
        return self._change[start : start + count]

    def digests(self) -> list[tuple[str, str]]:
        """Return the digests of the adapter's tensors."""
        return list(self._digests.items())


class NoChange:
    """A weight that an adapter leaves as it is.

    Args:
        base: The base's tensor.
    """

    def __init__(self, base: TensorReader) -> None:
        self._base = base

    def weight(self, start: int, count: int) -> Tensor:
        """Return a piece of W_0."""
        return self._base.kept(start, count).clone()

    def delta(self, start: int, count: int) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(self._base.kept(start, count))

    def digests(self) -> list[tuple[str, str]]:
        """Return nothing: no tensor was read."""
        return []
