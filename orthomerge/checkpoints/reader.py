"""Checkpoints opened for reading: a set of named tensors whose bytes are fetched on demand.

Opening reads headers only. How a path, folder, hub name or dict becomes a checkpoint is in
``sources``; what the tensors mean is not decided here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orthomerge.checkpoints.dtypes import safetensors_dtype, torch_dtype
from orthomerge.checkpoints.header import Header, TensorInfo
from orthomerge.errors import CheckpointError, ShardIndexError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "FileCheckpoint", "StateDictCheckpoint"]


class Checkpoint(Protocol):
    """Named tensors that can be read in pieces, from any thread."""

    @property
    def origin(self) -> str:
        """Where it came from, as the user wrote it."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, in file order."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free-form metadata of the (first) file."""

    @property
    def folder(self) -> Path | None:
        """Folder with config and tokenizer files, if there is one."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Tensor files it reads from."""

    def read_into(self, name: str, buffer: memoryview, start: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from byte ``start`` on."""

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor."""

    def prefetch(self, name: str) -> None:
        """Hint that the tensor will be read soon."""

    def fingerprint(self) -> list[list[object]]:
        """Return what identifies the content cheaply: size and modification time per file."""

    def check_unchanged(self) -> None:
        """Refuse when the content was modified after it was opened."""

    def close(self) -> None:
        """Release file handles."""


class FileCheckpoint:
    """One or more safetensors files seen as one set of tensors.

    Args:
        origin: What the user wrote, for messages.
        files: Path and checked header of each file.
        folder: Folder with config and tokenizer files.

    Raises:
        ShardIndexError: The same tensor is in two files.
    """

    def __init__(
        self, origin: str, files: Mapping[Path, Header], folder: Path | None = None
    ) -> None:
        self.origin = origin
        self.folder = folder
        self.files = tuple(files)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata = dict(next(iter(files.values())).metadata)
        self._where: dict[str, Path] = {}
        for path, header in files.items():
            for name, info in header.tensors.items():
                if name in self._where:
                    raise ShardIndexError(
                        f"is in two shards, {self._where[name].name} and {path.name}",
                        file=origin,
                        tensor=name,
                        remedy="Remove the shard that does not belong to this model.",
                    )
                self._where[name] = path
                self.tensors[name] = info
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._opened_as = self.fingerprint()

    def read_into(self, name: str, buffer: memoryview, start: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from byte ``start`` on.

        Raises:
            CheckpointError: The file ends early, i.e. it changed since it was opened.
        """
        path = self._where[name]
        position = self.tensors[name].begin + start
        handle, filled = self._handle(path), 0
        while filled < len(buffer):
            count = os.preadv(handle, [buffer[filled:]], position + filled)
            if count == 0:
                raise CheckpointError(
                    "the file became shorter while it was being read",
                    file=path,
                    tensor=name,
                    remedy="Do not write to the inputs during a merge; run again.",
                )
            filled += count

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor in its stored dtype."""
        import torch

        info = self.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self.read_into(name, raw.numpy().data)
        return raw.view(torch_dtype(info.dtype)).reshape(info.shape)

    def prefetch(self, name: str) -> None:
        """Ask the kernel to read the tensor ahead, where the platform can."""
        if hasattr(os, "posix_fadvise"):
            info, handle = self.tensors[name], self._handle(self._where[name])
            os.posix_fadvise(handle, info.begin, info.nbytes, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> list[list[object]]:
        """Return name, size and modification time of every file."""
        stats = [(path.name, path.stat()) for path in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def check_unchanged(self) -> None:
        """Refuse when a file was modified after it was opened."""
        if self.fingerprint() != self._opened_as:
            raise CheckpointError(
                "was modified while it was being read",
                file=self.origin,
                remedy="Do not write to the inputs during a merge; run again with --overwrite.",
            )

    def close(self) -> None:
        """Close all file handles."""
        with self._lock:
            while self._handles:
                os.close(self._handles.popitem()[1])

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self._handles[path]


class StateDictCheckpoint:
    """Tensors that are already in memory, seen as a checkpoint.

    Names that share storage, shape and layout are tied: ``aliases`` maps the later to the first.

    Raises:
        CheckpointError: A value is no dense tensor with data.
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
        self._values = {
            name: _dense(origin, name, value).detach() for name, value in state_dict.items()
        }
        self.tensors = {
            name: TensorInfo(name, safetensors_dtype(value.dtype), tuple(value.shape))
            for name, value in self._values.items()
        }

    def read_into(self, name: str, buffer: memoryview, start: int = 0) -> None:
        """Copy the tensor's bytes from byte ``start`` on into ``buffer``."""
        import numpy as np
        import torch

        info = self.tensors[name]
        item = info.nbytes // max(info.numel, 1)
        flat = self._values[name].reshape(-1)[start // item : (start + len(buffer)) // item]
        raw = flat.cpu().contiguous().view(torch.uint8).numpy()
        np.copyto(np.frombuffer(buffer, dtype=np.uint8), raw)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor itself."""
        return self._values[name]

    def prefetch(self, name: str) -> None:
        """Do nothing: the data is in memory."""

    def fingerprint(self) -> list[list[object]]:
        """Return name, size and modification time of the files it was loaded from, if any."""
        stats = [(path.name, path.stat()) for path in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def check_unchanged(self) -> None:
        """Do nothing: the values were taken when it was opened."""

    def close(self) -> None:
        """Do nothing: there are no handles."""


def _dense(origin: str, name: str, value: torch.Tensor) -> torch.Tensor:
    import torch

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
    return value
