"""Tensors that are already in memory, or mapped there from a pickle file, seen as a checkpoint.

Values are checked here and their bytes copied out; unpickling is in ``pickles``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orthomerge.checkpoints.dtypes import safetensors_dtype
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.reader import check_unmodified, file_stats
from orthomerge.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    import torch

__all__ = ["StateDictCheckpoint"]

_BLOCK_BYTES = 1 << 20


class StateDictCheckpoint:
    """Tensors that are already in memory, seen as a checkpoint.

    Tensors may share storage and be views of any layout; their bytes are those of the contiguous
    tensor.

    Raises:
        CheckpointError: A value is no dense tensor with data, or a name is not one for a file.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor],
        origin: str = "state dict",
        folder: Path | None = None,
        files: tuple[Path, ...] = (),
    ) -> None:
        self.origin = origin
        self.folder = folder
        self.files = files
        self.metadata: dict[str, str] = {}
        self._values = {name: _dense(origin, name, value) for name, value in state_dict.items()}
        self.tensors = {
            name: TensorInfo(name, _dtype_name(origin, name, value), tuple(value.shape))
            for name, value in self._values.items()
        }
        self._opened_as = file_stats(files)

    def read_into(self, name: str, buffer: memoryview, start: int = 0) -> None:
        """Copy the tensor's bytes from byte ``start`` on into ``buffer``."""
        import torch

        flat = self._values[name].reshape(-1)
        if flat.numel() and flat.stride(0) != 1:  # one entry of a column, say
            flat = flat.clone(memory_format=torch.contiguous_format)
        if not self._values[name].is_contiguous():  # or every piece would copy the whole again
            self._values[name] = flat.view(self.tensors[name].shape)
        raw = flat.view(torch.uint8)[start : start + len(buffer)]
        buffer[:] = raw.cpu().numpy().data

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor itself."""
        return self._values[name]

    def prefetch(self, name: str) -> None:
        """Do nothing: the data is in memory."""

    def fingerprint(self) -> list[list[object]]:
        """Return the files' sizes and times or, without files, every tensor's checksum."""
        if self.files:
            return file_stats(self.files)
        return [[name, info.nbytes, self._checksum(name)] for name, info in self.tensors.items()]

    def check_unchanged(self) -> None:
        """Refuse when a file that is mapped into memory was modified after it was opened."""
        check_unmodified(self.origin, self.files, self._opened_as)

    def close(self) -> None:
        """Do nothing: there are no handles."""

    def _checksum(self, name: str) -> int:
        size, checksum = self.tensors[name].nbytes, 0
        buffer = memoryview(bytearray(min(_BLOCK_BYTES, size)))
        for start in range(0, size, _BLOCK_BYTES):
            block = buffer[: min(_BLOCK_BYTES, size - start)]
            self.read_into(name, block, start)
            checksum = zlib.crc32(block, checksum)
        return checksum


def _dense(origin: str, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, without gradient and lazy conjugation, if it has plain data."""
    import torch

    if not _is_tensor_name(name):
        raise CheckpointError(f"{name!r} is not a tensor name", file=origin)
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"is a {type(value).__name__}, not a tensor",
            file=origin,
            tensor=name,
            remedy="Pass a flat mapping from names to tensors.",
        )
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise CheckpointError(
            "is sparse, quantised or on the meta device",
            file=origin,
            tensor=name,
            remedy="Convert it to a dense tensor with data first.",
        )
    return value.detach().resolve_conj().resolve_neg()


def _is_tensor_name(name: object) -> bool:
    """Return whether a header can hold the name: text, and not the key of the metadata."""
    if not isinstance(name, str) or name == "__metadata__":
        return False
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _dtype_name(origin: str, name: str, value: torch.Tensor) -> str:
    try:
        return safetensors_dtype(value.dtype)
    except RecipeError as error:
        raise CheckpointError(
            error.problem, file=origin, tensor=name, remedy=error.remedy
        ) from error
