"""Read comma, semicolon or tab separated tables with a header line.

Every cell stays text; what a column means is decided in columns.py.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orthomerge.errors import DataError
from orthomerge.unlearning.data.records import Found, Record, read_text

__all__ = ["read_csv"]

_SEPARATORS = (",", ";", "\t")
_LONGEST_CELL = 1 << 30


def read_csv(path: Path) -> Found:
    """Return the records of a table; an empty cell is an empty text.

    The separator of ``.tsv`` is the tab, else the one of ``,`` ``;`` and tab that splits the header
    into most columns. A record's line is the one it begins on: cells may hold line breaks.

    Raises:
        DataError: The file cannot be read, or its header is no list of different names.
    """
    text = read_text(path)
    separators = ("\t",) if path.suffix.lower() == ".tsv" else _SEPARATORS
    # max keeps the first of equals: a single column is read with commas.
    separator = max(separators, key=lambda candidate: len(_first(text, candidate)))
    found = Found()
    with _long_cells():
        lines = _numbered(path, text, separator, found)
        header = next(lines, None)
        if header is None:
            return found
        names = [name.strip() for name in header[1]]
        _check_header(f"{path}:{header[0]}", names)
        for number, cells in lines:
            where = f"{path}:{number}"
            if len(cells) == len(names):
                found.records.append(Record(where, dict(zip(names, cells, strict=True))))
            else:
                found.problems.append(_wrong_count(where, len(names), len(cells)))
    return found


def _numbered(
    path: Path, text: str, separator: str, found: Found
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line that each row begins on, and its cells; blank lines are skipped."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The reader has lost its place: what follows would be guesswork.
            found.problems.append(
                DataError(
                    f"malformed table: {error}",
                    file=f"{path}:{line}",
                    remedy="Close every quotation mark, and double those inside a cell.",
                )
            )
            return
        if cells:
            yield line, cells


def _first(text: str, separator: str) -> list[str]:
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        return next((cells for cells in rows if cells), [])
    except csv.Error:
        return []


def _check_header(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if all(names) and not twice:
        return
    raise DataError(
        "the header does not name every column, each once",
        file=where,
        found=", ".join(repr(name) for name in names),
        remedy="The first line must hold the column names.",
    )


def _wrong_count(where: str, expected: int, found: int) -> DataError:
    return DataError(
        "a row has not as many cells as the header",
        file=where,
        expected=expected,
        found=found,
        remedy="Put cells that hold the separator or a line break in quotation marks.",
    )


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow cells beyond the csv module's 128 KiB: whole documents are rows here."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
