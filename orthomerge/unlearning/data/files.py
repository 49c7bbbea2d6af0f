"""Find the reader for a path: by suffix, by what a folder holds, and by content within JSON.

``path#split`` names one split of a file or folder that holds several.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orthomerge.errors import DataError, nearest
from orthomerge.unlearning.data.arrow_files import (
    is_dataset_folder,
    read_dataset_folder,
    read_parquet,
)
from orthomerge.unlearning.data.csv_files import read_csv
from orthomerge.unlearning.data.json_files import read_json
from orthomerge.unlearning.data.records import Found, Record, read_text

__all__ = ["SUFFIXES", "read_records"]

_WITH_SPLITS = {".json": read_json, ".jsonl": read_json, ".ndjson": read_json}


def _read_paragraphs(path: Path) -> Found:
    """Return one record per paragraph; paragraphs are parted by blank lines."""
    found, begin = Found(), 0
    paragraph: list[str] = []
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        if line.strip():
            begin = begin if paragraph else number
            paragraph.append(line.rstrip())
        elif paragraph:
            found.records.append(Record(f"{path}:{begin}", {"text": "\n".join(paragraph)}))
            paragraph = []
    return found


_WHOLE: dict[str, Callable[[Path], Found]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": _read_paragraphs,
}

#: Suffixes of files that can be read.
SUFFIXES = (*_WITH_SPLITS, *_WHOLE)


def read_records(given: str | Path) -> Found:
    """Return what a file or dataset folder holds.

    Args:
        given: A path, or ``path#split``.

    Raises:
        DataError: There is no such file, or it cannot be read.
        UnknownNameError: There is no such split.
        MissingExtraError: Its format needs a package that is not installed.
    """
    path, split = _located(given)
    if path.is_dir():
        if not is_dataset_folder(path):
            raise _no_dataset(path)
        return read_dataset_folder(path, split)
    suffix = path.suffix.lower()
    if suffix in _WITH_SPLITS:
        return _WITH_SPLITS[suffix](path, split)
    if suffix not in _WHOLE:
        raise DataError(
            "its suffix names no format that can be read",
            file=path,
            expected=", ".join(SUFFIXES),
            found=suffix or "no suffix",
        )
    if split is not None:
        raise DataError("has no splits", file=path, found=f"#{split}")
    return _WHOLE[suffix](path)


def _located(given: str | Path) -> tuple[Path, str | None]:
    """Part the split from the path; a file that really has a ``#`` in its name comes first."""
    path = Path(given)
    if path.exists():
        return path, None
    place, _, split = str(given).rpartition("#")
    if place and Path(place).exists():
        return Path(place), split
    raise _absent(Path(place) if place else path)


def _absent(path: Path) -> DataError:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    similar = nearest(path.name, names)
    if similar:
        remedy = f"Did you mean '{folder / similar}'?"
    elif folder.is_dir():
        remedy = "A dataset of the Hugging Face hub must be downloaded first: give a local path."
    else:
        remedy = f"There is no folder '{folder}' either."
    return DataError("there is no such file or folder", file=path, remedy=remedy)


def _no_dataset(folder: Path) -> DataError:
    names = sorted(entry.name for entry in folder.iterdir())
    usable = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    return DataError(
        "is a folder, but not one written by save_to_disk of 'datasets'",
        file=folder,
        found=", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "nothing",
        remedy=f"Name one file, e.g. '{folder / usable[0]}'."
        if usable
        else f"Give a file ({', '.join(SUFFIXES)}) or a saved dataset.",
    )
