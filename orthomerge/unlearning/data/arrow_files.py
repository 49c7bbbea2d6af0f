"""Read Parquet files and folders that ``datasets`` has saved; both packages are optional.

Such tables have no lines: a record's place is its row, counted from 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orthomerge.errors import DataError, MissingExtraError, UnknownNameError
from orthomerge.unlearning.data.records import Found

__all__ = ["is_dataset_folder", "read_dataset_folder", "read_parquet"]

_EXTRA = "unlearn"
_ONE_SET, _SEVERAL_SETS = "state.json", "dataset_dict.json"


def read_parquet(path: Path) -> Found:
    """Return the records of a Parquet file.

    Raises:
        DataError: It is no Parquet file.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", _EXTRA, f"Reading {path}") from error
    try:
        # One file, whatever folders like "year=2020" are above it.
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("is not a readable Parquet file", file=path, found=error) from error
    return _numbered(path, rows)


def is_dataset_folder(path: Path) -> bool:
    """Return whether a folder was written by ``save_to_disk`` of ``datasets``."""
    return (path / _ONE_SET).is_file() or (path / _SEVERAL_SETS).is_file()


def read_dataset_folder(path: Path, split: str | None = None) -> Found:
    """Return the records of a saved ``Dataset``, or of one split of a saved ``DatasetDict``.

    Args:
        path: The folder.
        split: Which split; not needed when there is one.

    Raises:
        DataError: It cannot be read, or a split must be named.
        UnknownNameError: There is no such split.
        MissingExtraError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", _EXTRA, f"Reading {path}") from error
    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError("is not a readable dataset folder", file=path, found=error) from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _chosen(path, loaded, split)
    elif split is not None:
        raise DataError("has no splits", file=path, found=f"#{split}")
    return _numbered(path, loaded)


def _chosen(path: Path, splits: Any, split: str | None) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None:
        raise DataError(
            "holds several splits",
            file=path,
            found=", ".join(splits),
            remedy=f"Name one, e.g. '{path}#{next(iter(splits), 'train')}'.",
        )
    if split not in splits:
        raise UnknownNameError("split", split, splits, file=path)
    return splits[split]


def _numbered(path: Path, rows: Any) -> Found:
    found = Found()
    for number, row in enumerate(rows, start=1):
        found.add(f"{path}:{number}", row)
    return found
