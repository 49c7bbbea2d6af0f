"""The list, on disk, of the tensors that an unfinished run has written durably.

One JSON object per line: a head that says which run it belongs to, then finished tensors and, after
a mishap, tensors whose data is gone. Only whole lines count, because a kill can tear the last one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orthomerge.errors import ResumeError

__all__ = ["Journal", "fsync_folder", "fsync_write", "has_journal"]

_VERSION = 1


class Journal:
    """A journal open for appending; ``finished`` maps each tensor to its details.

    Args:
        path: The file.
        plan_hash: Identifies the plan.
        fingerprints: What identifies the inputs' content; JSON-ready.
        resume: Continue the journal that is there, instead of starting a new one.

    Raises:
        ResumeError: There is none to continue, or it belongs to another plan or other inputs.
    """

    def __init__(
        self, path: Path, plan_hash: str, fingerprints: object, *, resume: bool = False
    ) -> None:
        head = {"version": _VERSION, "plan": plan_hash, "inputs": fingerprints}
        self.finished: dict[str, Any] = {}
        if resume:
            found, self.finished, length = _read(path)
            _check_head(path, found, head)
            os.truncate(path, length)
        else:
            fsync_write(path, _line(head))
        self._file = path.open("ab")

    def record(self, entries: Mapping[str, Any]) -> None:
        """Append finished tensors; their data must be on disk already."""
        self._append(_line({"tensor": n, "details": d}) for n, d in entries.items())

    def forget(self, names: Iterable[str]) -> None:
        """Take back tensors whose data is gone, before their place is filled with zeros."""
        lost = sorted(set(names) & set(self.finished))
        if lost:
            self._append([_line({"lost": lost})])
            self.finished = {k: v for k, v in self.finished.items() if k not in lost}

    def close(self) -> None:
        """Close the file; what a full disk kept from being written does not count."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _append(self, lines: Iterable[bytes]) -> None:
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())


def has_journal(path: Path) -> bool:
    """Return whether a run got as far as its journal's head; without it no tensor was written."""
    return _read(path)[0] is not None


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any], int]:
    """Return the head, the finished tensors, and how many bytes can be believed."""
    head: dict[str, Any] | None = None
    finished: dict[str, Any] = {}
    length = 0
    if not path.is_file():
        return head, finished, length
    for line in path.read_bytes().split(b"\n")[:-1]:  # after the last newline: nothing, or torn
        try:
            entry = json.loads(line)
            if head is None:
                head = dict(entry)
            elif "lost" in entry:
                for name in entry["lost"]:
                    finished.pop(name, None)
            else:
                finished[entry["tensor"]] = entry["details"]
        except (ValueError, TypeError, KeyError):  # a crash of the machine can leave any bytes
            break
        length += len(line) + 1
    return head, finished, length


def _check_head(path: Path, found: Mapping[str, Any] | None, head: Mapping[str, object]) -> None:
    if found is None:
        raise ResumeError(
            "there is no interrupted run to resume",
            file=path.parent,
            remedy="Run the same command without --resume.",
        )
    for key, what in (("version", "format"), ("plan", "plan"), ("inputs", "inputs")):
        if found.get(key) != json.loads(json.dumps(head[key])):
            raise ResumeError(
                f"the {what} changed since the interrupted run",
                file=path.parent,
                remedy="Repeat the first command exactly, or start afresh with --overwrite.",
            )


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
