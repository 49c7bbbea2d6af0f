"""Checkpoints opened for reading: a set of named tensors whose bytes are fetched on demand.

Opening reads headers only. How a path, folder, hub name or dict becomes a checkpoint is in
``sources``, tensors in memory are in ``state_dict``; what they mean is not decided here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orthomerge.checkpoints.dtypes import torch_dtype
from orthomerge.checkpoints.header import Header, TensorInfo
from orthomerge.errors import CheckpointError, ShardIndexError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "FileCheckpoint", "check_unmodified", "file_stats", "unreadable"]


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
        """Return what identifies the content cheaply: size and time per file, or checksums."""

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
            CheckpointError: The file cannot be read, or ends early: it changed since it was opened.
        """
        path = self._where[name]
        position = self.tensors[name].begin + start
        handle, filled = self._handle(path), 0
        while filled < len(buffer):
            try:
                count = os.preadv(handle, [buffer[filled:]], position + filled)
            except OSError as error:
                raise unreadable(path, error) from error
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
        info = self.tensors[name]
        if hasattr(os, "posix_fadvise") and info.nbytes:  # 0 would mean: up to the end of the file
            handle = self._handle(self._where[name])
            os.posix_fadvise(handle, info.begin, info.nbytes, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> list[list[object]]:
        """Return name, size and modification time of every file."""
        return file_stats(self.files)

    def check_unchanged(self) -> None:
        """Refuse when a file was modified after it was opened."""
        check_unmodified(self.origin, self.files, self._opened_as)

    def close(self) -> None:
        """Close all file handles."""
        with self._lock:
            while self._handles:
                os.close(self._handles.popitem()[1])

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                try:
                    self._handles[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    raise unreadable(path, error) from error
            return self._handles[path]


def file_stats(files: Iterable[Path]) -> list[list[object]]:
    """Return name, size and modification time of files.

    Raises:
        CheckpointError: One of them is gone.
    """
    found: list[list[object]] = []
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        found.append([path.name, stat.st_size, stat.st_mtime_ns])
    return found


def check_unmodified(origin: str, files: Iterable[Path], opened_as: list[list[object]]) -> None:
    """Refuse files whose size or time differs from ``opened_as``.

    Raises:
        CheckpointError: They were modified.
    """
    if file_stats(files) != opened_as:
        raise CheckpointError(
            "was modified while it was being read",
            file=origin,
            remedy="Do not write to the inputs during a merge; run again with --overwrite.",
        )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error that says why a file cannot be read."""
    return CheckpointError(
        f"cannot be read: {error.strerror}",
        file=path,
        remedy="Check that the file is still there and that the disk is sound.",
    )
