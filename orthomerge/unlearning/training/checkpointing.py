"""Points a run can be resumed from: the Trainer's own, completed by what only we know.

A point counts once our file is in it, which is written last; others are removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from orthomerge.errors import ResumeError

__all__ = ["latest_point", "load_point", "save_point", "step_of"]

_FILE = "orthomerge.pt"


def save_point(folder: Path, state: dict[str, Any]) -> None:
    """Complete a Trainer checkpoint; durable when this returns."""
    partial = folder / f"{_FILE}.partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / _FILE)


def load_point(folder: Path) -> dict[str, Any]:
    """Return what ``save_point`` was given.

    Raises:
        ResumeError: It cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ResumeError(
            f"cannot be read: {error}",
            file=folder / _FILE,
            remedy="Run again with --overwrite instead of --resume.",
        ) from error
    return state


def latest_point(work: Path) -> Path | None:
    """Return the newest complete checkpoint, and remove the incomplete ones."""
    found = []
    for folder in work.glob("checkpoint-*") if work.is_dir() else ():
        if (folder / _FILE).is_file():
            found.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return max(found, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint folder was saved after."""
    return int(folder.name.rpartition("-")[2])
