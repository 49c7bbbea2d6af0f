"""What every reader of a data file gives: records with the place they come from, and problems.

No format is known here, and no meaning of a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orthomerge.errors import DataError

__all__ = ["Found", "Record", "read_text"]

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_SAVE_AS_UTF8 = "Save the file as UTF-8."


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file before its columns have a meaning.

    Args:
        where: ``"file:line"``, or ``"file:row"`` of a table without lines.
        values: Column name to value.
    """

    where: str
    values: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds: its records, and what is wrong with the others."""

    records: list[Record] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)

    def add(self, where: str, value: object) -> None:
        """Take a decoded value as a record, or note that it is none."""
        if isinstance(value, Mapping):
            self.records.append(Record(where, value))
            return
        self.problems.append(
            DataError(
                "a row is not an object",
                file=where,
                expected='{"column": value, …}',
                found=type(value).__name__,
            )
        )


def read_text(path: Path) -> str:
    """Return a file's text, without a byte order mark.

    Raises:
        DataError: It cannot be read, or is not UTF-8; names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=path) from error
    if data.startswith(_UTF_16):
        raise DataError("is UTF-16, not UTF-8", file=path, remedy=_SAVE_AS_UTF8)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a mark, positions count from behind it; it holds no line break.
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            "is not UTF-8 text",
            file=f"{path}:{line}",
            found=f"byte 0x{error.object[error.start]:02x}",
            remedy=_SAVE_AS_UTF8,
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            "holds a NUL character: not a text file, or not in UTF-8",
            file=f"{path}:{line}",
            remedy=_SAVE_AS_UTF8,
        )
    return text
