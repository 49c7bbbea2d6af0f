"""Write tensors to their final place, in any order, from several threads, whole or not at all.

Every shard's header is written and its space reserved first; no tensor is buffered here. A
background thread makes finished tensors durable and then journals them, so that disk and
computation overlap and an interrupted run can go on from the last journalled tensor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orthomerge.checkpoints.dtypes import torch_dtype
from orthomerge.checkpoints.header import TensorInfo, encode_header
from orthomerge.checkpoints.journal import fsync_write
from orthomerge.checkpoints.layout import INDEX_NAME, Layout, Shard
from orthomerge.checkpoints.staging import Staging
from orthomerge.errors import BudgetError, OrthoMergeError

if TYPE_CHECKING:
    import torch

__all__ = ["MemoryWriter", "StreamingWriter", "TensorSink"]

_SYNC_BYTES = 256 << 20


class TensorSink(Protocol):
    """Where the engine sends its results.

    ``finished`` holds the details of the tensors that an earlier, interrupted run finished.
    """

    finished: dict[str, Any]

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Store bytes of a tensor from byte ``start`` on."""

    def finish(self, name: str, details: Any) -> None:
        """Declare that all bytes of a tensor have been written."""


class StreamingWriter:
    """Write an output described by a layout into a staging folder and publish it.

    Args:
        layout: Shards, headers and places.
        staging: The folder under construction, new or resumed; closed by the writer.

    Raises:
        BudgetError: The disk cannot hold the output.
    """

    def __init__(self, layout: Layout, staging: Staging) -> None:
        self._layout = layout
        self._staging = staging
        self._sizes = {info.name: info.nbytes for s in layout.shards for info in s.tensors}
        self._handles: dict[str, int] = {}
        self._pending: dict[str, Any] = {}
        self._pending_bytes = 0
        self._failure: BaseException | None = None
        self._closing = False
        self._wake = threading.Condition()
        self.finished: dict[str, Any] = {}
        try:
            self._forget_lost()
            for shard in layout.shards:
                self._open_shard(shard)
        except BaseException as error:
            self._close_handles()
            staging.close()
            if isinstance(error, OSError):
                raise self._disk_error(error, staging.files) from error
            raise
        self.finished = {n: d for n, d in staging.finished.items() if n in layout.places}
        self._syncer = threading.Thread(target=self._sync_loop, name="orthomerge-sync", daemon=True)
        self._syncer.start()

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Store bytes of a tensor from byte ``start`` on; thread-safe.

        Raises:
            BudgetError: The disk is full.
        """
        place = self._layout.places[name]
        try:
            _write_at(self._handles[place.shard], data, place.offset + start)
        except OSError as error:
            raise self._disk_error(error, self._staging.files / place.shard) from error

    def finish(self, name: str, details: Any) -> None:
        """Declare a tensor written; it is journalled once it is on disk.

        Args:
            name: The tensor.
            details: JSON-ready facts that a resumed run needs to have back.
        """
        with self._wake:
            if self._failure:
                raise self._failure
            self._pending[name] = details
            self._pending_bytes += self._sizes[name]
            self._wake.notify()

    def flush(self) -> None:
        """Make all finished tensors durable and journalled, and stop the background thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._syncer.join()
        if self._failure:
            raise self._failure

    def publish(
        self,
        files: Mapping[str, bytes],
        *,
        single_file: bool = False,
        metadata: Mapping[str, str] | None = None,
        check: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Complete the output with small files and move it to its place.

        Args:
            files: File name to content: config, provenance, model card; the index is added here.
            single_file: The output is the one shard itself, not a folder.
            metadata: Final ``__metadata__`` of the headers; must fit the space of the planned one.
            check: Called with the complete output before it is moved: a folder, or the one file.
        """
        files = dict(files)
        index = self._layout.index_json()
        if index is not None:
            files[INDEX_NAME] = index.encode()
        shards = [shard.filename for shard in self._layout.shards]
        try:
            self.flush()
            if metadata is not None:
                self._rewrite_headers(metadata)
            for handle in self._handles.values():
                os.fsync(handle)
            for name, content in files.items():
                fsync_write(self._staging.files / name, content)
            check(self._staging.files / shards[0] if single_file else self._staging.files)
            self._staging.publish({*shards, *files}, shards[0] if single_file else None)
        except OSError as error:
            raise self._disk_error(error, self._staging.files) from error
        finally:
            self._close_handles()
            self._staging.close()

    def abandon(self, *, discard: bool = False) -> None:
        """Journal what is finished, as far as the disk allows, and leave it for ``--resume``.

        Args:
            discard: There is nothing to resume: remove the partial output instead.
        """
        try:
            with contextlib.suppress(OrthoMergeError, OSError):  # then there is less to resume
                self.flush()
        finally:
            self._close_handles()
            if discard:
                self._staging.discard()
            else:
                self._staging.close()

    def _forget_lost(self) -> None:
        """Take back journalled tensors whose shard is not there at full size.

        The journal can outlive the files it speaks of: after a kill between publishing and
        cleaning up, or when somebody deletes them. It must say so on disk before the shard is made
        anew, or the next resume would take the zeros in it for finished tensors.
        """
        lost = []
        for shard in self._layout.shards:
            path = self._staging.files / shard.filename
            if not path.is_file() or path.stat().st_size != shard.nbytes:
                lost += [info.name for info in shard.tensors]
        self._staging.forget(lost)

    def _open_shard(self, shard: Shard) -> None:
        """Open or create a shard and write its header."""
        path = self._staging.files / shard.filename
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            self._handles[shard.filename] = handle
            if os.fstat(handle).st_size != shard.nbytes:
                os.ftruncate(handle, 0)
                os.ftruncate(handle, shard.nbytes)
                _reserve(handle, shard.nbytes)
            _write_at(handle, memoryview(shard.header), 0)
        except OSError as error:
            raise self._disk_error(error, path) from error

    def _rewrite_headers(self, metadata: Mapping[str, str]) -> None:
        for shard in self._layout.shards:
            header = encode_header(shard.tensors, metadata, length=len(shard.header))
            _write_at(self._handles[shard.filename], memoryview(header), 0)

    def _sync_loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._pending_bytes >= _SYNC_BYTES)
                batch, self._pending, self._pending_bytes = self._pending, {}, 0
                closing = self._closing
            try:
                if batch:
                    for shard in {self._layout.places[name].shard for name in batch}:
                        os.fsync(self._handles[shard])
                    self._staging.record(batch)
            except OSError as error:
                self._failure = self._disk_error(error, self._staging.files)
                return
            except BaseException as error:  # handed to the main thread by finish() or flush()
                self._failure = error
                return
            if closing:
                return

    def _close_handles(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _disk_error(self, error: OSError, path: Path) -> BudgetError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "Raise the limit of open files (ulimit -n) or --max-shard-size."
        else:
            remedy = "Free some space, then continue with --resume."
        return BudgetError(
            "the disk is full" if full else f"cannot be written: {error.strerror}",
            file=path,
            expected=f"{self._layout.nbytes} bytes of free space" if full else None,
            remedy=remedy,
        )


class MemoryWriter:
    """Collect results as torch tensors in ``tensors``."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        import torch

        self.finished: dict[str, Any] = {}
        self._raw = {name: torch.empty(i.nbytes, dtype=torch.uint8) for name, i in infos.items()}
        self.tensors: dict[str, torch.Tensor] = {
            name: self._raw[name].view(torch_dtype(info.dtype)).reshape(info.shape)
            for name, info in infos.items()
        }

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Copy bytes of a tensor from byte ``start`` on."""
        self._raw[name].numpy().data[start : start + len(data)] = data

    def finish(self, name: str, details: Any) -> None:
        """Do nothing: there is no journal."""


def _write_at(handle: int, data: memoryview, position: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(handle, data[written:], position + written)


def _reserve(handle: int, nbytes: int) -> None:
    """Reserve disk blocks now, so that a full disk is found before the work."""
    if hasattr(os, "posix_fallocate") and nbytes:
        try:
            os.posix_fallocate(handle, 0, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            # Some file systems cannot reserve; the planner has checked the free space.
