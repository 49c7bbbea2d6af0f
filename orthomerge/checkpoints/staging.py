"""The folder ``OUT.partial`` in which an output grows until one rename publishes it.

Holds the lock against a second run, the journal of finished tensors, and the rules about what may
be replaced. The tensor bytes themselves are written by ``writer``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orthomerge.errors import OutputError, ResumeError

__all__ = ["Staging", "check_destination", "fsync_folder", "fsync_write"]

_JOURNAL_VERSION = 1


def check_destination(
    output: Path, inputs: Iterable[Path], *, single_file: bool, overwrite: bool
) -> None:
    """Refuse an output that exists (without ``overwrite``) or that would touch an input.

    Args:
        output: Where the result shall be.
        inputs: Files and folders of the sources.
        single_file: The output is one file; it may lie beside input files, not replace one.
        overwrite: Whether an existing output may be replaced.

    Raises:
        OutputError: With the reason.
    """
    target = output.resolve()
    for source in inputs:
        path = source.resolve()
        inside = path in target.parents and not single_file
        if target == path or target in path.parents or inside:
            raise OutputError(
                f"the output would overwrite or lie inside the input {source}",
                file=output,
                remedy="Choose another output path; inputs are never overwritten.",
            )
    if output.exists() and not overwrite:
        raise OutputError(
            "the output already exists",
            file=output,
            remedy="Choose another path, or pass --overwrite to replace it.",
        )
    if output.exists() and output.is_dir() and not _looks_like_output(output):
        raise OutputError(
            "the folder to overwrite does not look like a model",
            file=output,
            remedy="Remove it yourself if it may go, or choose another path.",
        )


def _looks_like_output(folder: Path) -> bool:
    """Guard against ``--overwrite`` on, say, a home folder."""
    names = {path.name for path in folder.iterdir()}
    known = {"config.json", "adapter_config.json", "orthomerge.json"}
    return not names or bool(names & known) or any(name.endswith(".safetensors") for name in names)


class Staging:
    """An output under construction.

    Args:
        output: Where the finished file or folder will be.
        plan_hash: Identifies the plan; a journal of another plan is never continued.
        fingerprints: What identifies the inputs' content; JSON-ready.
        resume: Continue what an interrupted run left.
        overwrite: Discard what an interrupted run left, and replace ``output`` when publishing.

    Raises:
        OutputError: A partial output is there and neither ``resume`` nor ``overwrite`` is set, or
            another process is working on it.
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
        self.root = output.with_name(output.name + ".partial")
        self.files = self.root / "out"
        self._journal_path = self.root / "journal.jsonl"
        self._overwrite = overwrite
        self.finished: dict[str, Any] = {}
        head = {"version": _JOURNAL_VERSION, "plan": plan_hash, "inputs": fingerprints}
        self._check_state(resume, overwrite)
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire_lock()
        if resume:
            self.finished = self._read_journal(head)
        else:
            self._clear()
            fsync_write(self._journal_path, (json.dumps(head) + "\n").encode())
        self.files.mkdir(exist_ok=True)
        self._journal = self._journal_path.open("a", encoding="utf-8")

    def record(self, entries: Mapping[str, Any]) -> None:
        """Append finished tensors to the journal; their data must be on disk already."""
        for name, details in entries.items():
            self._journal.write(json.dumps({"tensor": name, "details": details}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def publish(self, single_file: str | None = None) -> None:
        """Move the finished output to its place with one rename, then remove the rest.

        Args:
            single_file: Name of the one file that is the output; None publishes the folder.
        """
        fsync_folder(self.files)
        finished = self.files / single_file if single_file else self.files
        if self.output.is_dir():  # rename cannot replace a folder that is not empty
            old = self.root / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            self.output.rename(old)
        finished.replace(self.output)
        fsync_folder(self.output.parent)
        self.close()
        shutil.rmtree(self.root)

    def discard(self) -> None:
        """Remove the partial output."""
        shutil.rmtree(self.root, ignore_errors=True)

    def close(self) -> None:
        """Release the journal and the lock; the partial output stays."""
        self._journal.close()
        os.close(self._lock)

    def _check_state(self, resume: bool, overwrite: bool) -> None:
        if resume and not self._journal_path.exists():
            raise ResumeError(
                "there is no interrupted run to resume",
                file=self.root,
                remedy="Run the same command without --resume.",
            )
        if not resume and not overwrite and self._journal_path.exists():
            raise OutputError(
                "an interrupted run left a partial output",
                file=self.root,
                remedy="Pass --resume to continue it or --overwrite to start afresh.",
            )
        found = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        if found - {"lock", "out", "journal.jsonl", "replaced"}:
            raise OutputError(
                "holds files that orthomerge did not write",
                file=self.root,
                remedy="Move them away, or choose another output path.",
            )

    def _acquire_lock(self) -> int:
        handle = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise OutputError(
                "another process is writing this output",
                file=self.root,
                remedy="Wait for it to end, or choose another output path.",
            ) from error
        return handle

    def _clear(self) -> None:
        shutil.rmtree(self.files, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self._journal_path.unlink()

    def _read_journal(self, head: Mapping[str, object]) -> dict[str, Any]:
        lines = self._journal_path.read_bytes().split(b"\n")
        complete = lines[:-1]  # a line without its newline was torn by the interruption
        found = json.loads(complete[0]) if complete else {}
        for key, what in (("version", "format"), ("plan", "plan"), ("inputs", "inputs")):
            if found.get(key) != json.loads(json.dumps(head[key])):
                raise ResumeError(
                    f"the {what} changed since the interrupted run",
                    file=self.root,
                    remedy="Repeat the first command exactly, or start afresh with --overwrite.",
                )
        if lines[-1]:
            with self._journal_path.open("rb+") as journal:
                journal.truncate(sum(len(line) + 1 for line in complete))
        entries = [json.loads(line) for line in complete[1:]]
        return {entry["tensor"]: entry["details"] for entry in entries}


def fsync_write(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
