"""The folder ``OUT.partial`` in which an output grows until one rename publishes it.

Holds the lock against a second run. The tensor bytes themselves are written by ``writer``, the list
of finished tensors by ``journal``; what may be replaced is decided in ``destination``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from orthomerge.checkpoints.destination import check_replaceable, partial_folder
from orthomerge.checkpoints.journal import Journal, fsync_folder, has_journal
from orthomerge.errors import OutputError, ResumeError

__all__ = ["Staging"]

_LOCK, _OUT, _JOURNAL, _REPLACED = "lock", "out", "journal.jsonl", "replaced"
_WORK = "work"


class Staging:
    """An output under construction.

    Args:
        output: Where the finished file or folder will be.
        plan_hash: Identifies the plan; a journal of another plan is never continued.
        fingerprints: What identifies the inputs' content; JSON-ready.
        resume: Continue what an interrupted run left.
        overwrite: Discard what an interrupted run left, unless ``resume`` is set too, and replace
            ``output`` when publishing.

    ``files`` is the folder that becomes the output; ``work``, which is not made here, is for
    what only a resumed run needs.

    Raises:
        OutputError: A partial output is there and neither ``resume`` nor ``overwrite`` is set,
            another process is working on it, or the folder cannot be made.
        ResumeError: ``resume`` is set and there is nothing to continue, or the plan or the inputs
            have changed.
    """

    def __init__(
        self,
        output: Path,
        plan_hash: str,
        fingerprints: object,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.output = output
        self.root = partial_folder(output)
        self.files = self.root / _OUT
        self.work = self.root / _WORK
        self._overwrite = overwrite
        self._check_content()
        if resume and not self.root.is_dir():
            raise ResumeError(
                "there is no interrupted run to resume",
                file=self.root,
                remedy="Run the same command without --resume.",
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = self._acquire_lock()
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", file=self.root) from error
        try:
            self._journal = self._open_journal(plan_hash, fingerprints, resume)
            self.files.mkdir(exist_ok=True)
        except BaseException:
            self._release_lock()
            raise

    @property
    def finished(self) -> dict[str, Any]:
        """The journalled tensors and their details."""
        return self._journal.finished

    def record(self, entries: Mapping[str, Any]) -> None:
        """Journal finished tensors; their data must be on disk already."""
        self._journal.record(entries)

    def forget(self, names: Iterable[str]) -> None:
        """Take journalled tensors back, before their lost files are made anew."""
        self._journal.forget(names)

    def publish(self, names: Collection[str], single_file: str | None = None) -> None:
        """Move the finished output to its place with one rename, then remove the rest.

        Args:
            names: All files of the output; any other in the folder is removed first.
            single_file: Name of the one file that is the output; None publishes the folder.

        Raises:
            OutputError: Something else is at the output's place by now.
        """
        for path in self.files.iterdir():
            if path.name not in names:
                _remove(path)
        fsync_folder(self.files)
        if os.path.lexists(self.output) and not self._overwrite:
            raise OutputError(
                "the output has come to exist while it was being made",
                file=self.output,
                remedy="Move it away and run again with --resume, or pass --overwrite as well.",
            )
        check_replaceable(self.output, single_file is not None)
        if single_file is not None:
            (self.files / single_file).replace(self.output)
        else:
            self._publish_folder()
        fsync_folder(self.output.parent)
        self._clean_up()

    def discard(self) -> None:
        """Remove the partial output; an output that was about to be replaced goes back."""
        old = self.root / _REPLACED
        if os.path.lexists(old) and not os.path.lexists(self.output):
            old.rename(self.output)
        self._clean_up()

    def close(self) -> None:
        """Release the journal and the lock; the partial output stays."""
        self._journal.close()
        self._release_lock()

    def _publish_folder(self) -> None:
        old = self.root / _REPLACED
        if os.path.lexists(self.output):  # rename cannot replace a folder that is not empty
            _remove(old)
            self.output.rename(old)
        try:
            self.files.rename(self.output)
        except BaseException:
            if os.path.lexists(old):
                old.rename(self.output)
            raise

    def _clean_up(self) -> None:
        """Remove the folder, the lock last: until then nobody else may write into it."""
        with contextlib.suppress(OSError):
            for name in (_OUT, _WORK, _REPLACED, _JOURNAL, _LOCK):
                _remove(self.root / name)
            self.root.rmdir()
        self.close()

    def _check_content(self) -> None:
        found = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        own = {_LOCK, _OUT, _WORK, _JOURNAL, _REPLACED}
        orphaned = _JOURNAL not in found and self.files.is_dir() and any(self.files.iterdir())
        if found - own or orphaned:
            raise OutputError(
                "holds files that orthomerge did not write",
                file=self.root,
                remedy="Move them away, or choose another output path.",
            )

    def _acquire_lock(self) -> int:
        path = self.root / _LOCK
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file when it is done; then this lock keeps nobody out.
            if not os.path.samestat(os.fstat(handle), path.stat()):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            os.close(handle)
            raise OutputError(
                "another process is writing this output",
                file=self.root,
                remedy="Wait for it to end, or choose another output path.",
            ) from error
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open_journal(self, plan_hash: str, fingerprints: object, resume: bool) -> Journal:
        path = self.root / _JOURNAL
        if not resume:
            if has_journal(path) and not self._overwrite:
                raise OutputError(
                    "an interrupted run left a partial output",
                    file=self.root,
                    remedy="Pass --resume to continue it or --overwrite to start afresh.",
                )
            _remove(self.work)
            _remove(self.files)  # before the journal: files without one look like someone else's
            _remove(path)
        return Journal(path, plan_hash, fingerprints, resume=resume)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
