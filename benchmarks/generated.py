"""Folders of generated data: written once, told apart by what they were made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["generated_folder"]

_MANIFEST = "generated.json"


@contextmanager
def generated_folder(folder: Path, facts: Mapping[str, Any]) -> Iterator[bool]:
    """Make a folder for data, and say inside whether it has to be written.

    Args:
        folder: Where it goes; replaced if a former run made it.
        facts: What the data are made from; the folder is complete once it holds them.

    Raises:
        FileExistsError: ``folder`` holds something these programs did not write.
    """
    manifest = folder / _MANIFEST
    if manifest.is_file() and json.loads(manifest.read_text()) == facts:
        yield False
        return
    if folder.is_dir() and any(folder.iterdir()) and not manifest.is_file():
        raise FileExistsError(f"{folder} was not written by this program: remove it first")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    manifest.write_text("{}")  # marks the folder as ours until it is complete
    yield True
    manifest.write_text(json.dumps(facts))
