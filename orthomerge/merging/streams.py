"""Walk through tensors in flat pieces, lifted to the compute dtype and checked to be finite.

This is the only way tensor data enters a merge, so the non-finite check and the hash of the input
bytes happen here, on data that is in the cache anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthomerge.checkpoints.digest import tensor_hasher
from orthomerge.checkpoints.dtypes import ITEM_SIZES, torch_dtype
from orthomerge.errors import NumericalError
from orthomerge.linalg.selection import ChunkedValues

if TYPE_CHECKING:
    from orthomerge.checkpoints.reader import Checkpoint

__all__ = ["HeldStream", "JoinedStream", "TensorReader", "TensorStream", "check_finite"]

_SAMPLE_BLOCK = 2048  # entries read together for a sample: fewer reads, less independent


class TensorReader:
    """One tensor of one checkpoint, read in pieces into a buffer that is used again.

    A returned piece is valid until the next call.

    Args:
        checkpoint: Where the tensor is.
        name: Its name there.
        compute: dtype to lift to.
        device: Device to lift on.
        piece_elements: Most elements per piece.
        hashing: Whether to hash the bytes; pieces must then be read once, in order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        compute: torch.dtype,
        device: torch.device,
        piece_elements: int,
        *,
        hashing: bool = False,
    ) -> None:
        info = checkpoint.tensors[name]
        self.numel = info.numel
        self.piece_elements = piece_elements
        self._checkpoint, self._name = checkpoint, name
        self._compute, self._device = compute, device
        self._dtype, self._item = torch_dtype(info.dtype), ITEM_SIZES[info.dtype]
        self._raw = torch.empty(min(piece_elements, self.numel) * self._item, dtype=torch.uint8)
        self._bytes = self._raw.numpy().data
        self._hasher = tensor_hasher() if hashing else None
        self._kept: tuple[int, int, Tensor] | None = None

    def piece(self, start: int, count: int) -> Tensor:
        """Return ``count`` elements from flat index ``start`` on, lifted and checked.

        Raises:
            NumericalError: Some of them are not finite.
        """
        lifted = self.unchecked(start, count)
        self.check(lifted)
        return lifted

    def kept(self, start: int, count: int) -> Tensor:
        """Return the same as ``unchecked``; several models' streams share the base's pieces so."""
        if self._kept is None or self._kept[:2] != (start, count):
            self._kept = start, count, self.unchecked(start, count)
        return self._kept[2]

    def unchecked(self, start: int, count: int) -> Tensor:
        """Return ``count`` elements from flat index ``start`` on, lifted."""
        window = self._bytes[: count * self._item]
        self._checkpoint.read_into(self._name, window, start * self._item)
        if self._hasher:
            self._hasher.update(window)
        stored = self._raw[: count * self._item].view(self._dtype)
        return stored.to(device=self._device, dtype=self._compute)

    def check(self, lifted: Tensor) -> None:
        """Refuse a piece of this tensor that is not finite.

        Raises:
            NumericalError: Naming the file, the tensor and the place.
        """
        check_finite(lifted, self._checkpoint.origin, self._name, "the input")

    def nbytes(self, count: int) -> int:
        """Return the stored size of ``count`` elements."""
        return count * self._item

    def digest(self) -> str | None:
        """Return the hex digest of the bytes read."""
        return self._hasher.hexdigest() if self._hasher else None


class TensorStream:
    """One model's contribution to one weight, walked through in flat pieces.

    Args:
        numel: Number of entries.
        piece: Gives ``count`` entries from a flat index on.
        piece_elements: Most entries per piece.
    """

    def __init__(
        self, numel: int, piece: Callable[[int, int], Tensor], piece_elements: int
    ) -> None:
        self.numel = numel
        self._piece, self._step = piece, piece_elements

    def chunks(self) -> Iterator[Tensor]:
        """Yield all entries in order, once, as flat pieces."""
        for start in range(0, self.numel, self._step):
            yield self._piece(start, min(self._step, self.numel - start))

    def sample(self, count: int) -> Tensor:
        """Return about ``count`` entries: short runs at evenly spaced places."""
        runs = max(1, min(count, self.numel) // _SAMPLE_BLOCK)
        length = min(_SAMPLE_BLOCK, self.numel)
        spare = self.numel - length
        starts = [round((i + 0.5) / runs * spare) for i in range(runs)]
        return torch.cat([self._piece(start, length).clone() for start in starts])


class HeldStream(TensorStream):
    """A tensor that is in memory already, as a stream.

    Args:
        values: The tensor.
        piece_elements: Most entries per piece.
    """

    def __init__(self, values: Tensor, piece_elements: int = 1 << 17) -> None:
        flat = values.reshape(-1)
        super().__init__(flat.numel(), lambda at, count: flat[at : at + count], piece_elements)


class JoinedStream:
    """Several streams seen as one: a whole model.

    Args:
        sizes: Number of entries of each stream.
        open_stream: Opens the stream at a position; one is open at a time.
    """

    def __init__(self, sizes: Sequence[int], open_stream: Callable[[int], ChunkedValues]) -> None:
        self._sizes = {position: size for position, size in enumerate(sizes) if size}
        self._open = open_stream
        self.numel = sum(self._sizes.values())

    def chunks(self) -> Iterator[Tensor]:
        """Yield all entries of all streams."""
        for position in self._sizes:
            yield from self._open(position).chunks()

    def sample(self, count: int) -> Tensor:
        """Return about ``count`` entries, each stream's share by its size."""
        shares = {at: math.ceil(count * size / self.numel) for at, size in self._sizes.items()}
        return torch.cat([self._open(at).sample(share)[:share] for at, share in shares.items()])


def check_finite(
    values: Tensor,
    origin: str,
    name: str,
    what: str,
    remedy: str = "Repair or replace this checkpoint, or leave the tensor out.",
) -> None:
    """Refuse NaN and infinity.

    A sum is several times cheaper than an elementwise test and is non-finite whenever an entry is;
    the exact test runs only when the sum looks wrong (it can also overflow by itself).

    Raises:
        NumericalError: Naming the file, the tensor and the first bad entry's place.
    """
    if not values.numel() or math.isfinite(values.sum().item()):
        return
    bad = (~torch.isfinite(values.reshape(-1))).nonzero()
    if len(bad):
        raise NumericalError(
            f"{what} holds NaN or infinity ({len(bad)} in the piece that was looked at)",
            file=origin,
            tensor=name,
            found=str(values.reshape(-1)[bad[0, 0]].item()),
            remedy=remedy,
        )
