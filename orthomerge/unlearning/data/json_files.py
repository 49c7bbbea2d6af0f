"""Read JSON Lines, a JSON list, or a JSON object of lists, told apart by content, not by suffix.

Every element keeps its line, also inside a list: the lists are walked, not only decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from orthomerge.errors import DataError, UnknownNameError
from orthomerge.unlearning.data.records import Found, read_text

__all__ = ["read_json"]

_SPACE = re.compile(r"[ \t\r\n]*")
#: An object with one of these keys is one row, although its value is a list of objects.
_ROW_KEYS = {"messages", "conversations"}


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' occurs twice in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def read_json(path: Path, split: str | None = None) -> Found:
    """Return the records of a JSON file.

    Read are: one object per line; one list of objects; one object whose ``"data"`` is such a list,
    or whose values all are (named splits); one object that is itself a row.

    Args:
        path: The file.
        split: Which of several splits.

    Raises:
        DataError: The file as a whole cannot be read; names the line.
        UnknownNameError: There is no such split.
    """
    text = read_text(path)
    start = _skip(text, 0)
    if text.startswith("[", start):
        _refuse_split(path, split)
        return _list_at(path, text, start)
    document = _document(path, text, start)
    if document is None:
        _refuse_split(path, split)
        return _lines(path, text)
    return _from_object(path, text, start, document, split)


def _document(path: Path, text: str, start: int) -> dict[str, object] | None:
    """Return the one object that is the whole file, or None if it is read line by line."""
    try:
        value, end = _decode(text, start)
    except ValueError as error:
        first_line = text[start:].partition("\n")[0]
        if path.suffix != ".json" or _is_json(first_line):
            return None
        raise _malformed(path, text, start, error) from error
    whole = _skip(text, end) == len(text)
    return value if whole and isinstance(value, dict) else None


def _from_object(
    path: Path, text: str, start: int, document: dict[str, object], split: str | None
) -> Found:
    splits = {key: value for key, value in document.items() if isinstance(value, list)}
    if split is None and "data" in splits:
        split = "data"
    named = len(splits) == len(document) and all(
        isinstance(item, dict) for values in splits.values() for item in values
    )
    if split is None and (not named or not splits or _ROW_KEYS & set(document)):
        found = Found()
        found.add(f"{path}:{_line(text, start)}", document)
        return found
    if split is None and len(splits) > 1:
        raise DataError(
            "holds several splits",
            file=path,
            found=", ".join(splits),
            remedy=f"Name one, e.g. '{path}#{next(iter(splits))}'.",
        )
    split = split or next(iter(splits))
    if split not in splits:
        raise UnknownNameError("split", split, splits, file=path)
    return _list_at(path, text, _value_place(text, start, split))


def _list_at(path: Path, text: str, start: int) -> Found:
    """Read a list of objects; what is behind it is checked only where it is the whole file."""
    found, line, place = Found(), 1, 0
    try:
        for at, value in _elements(text, start):
            line += text.count("\n", place, at)
            place = at
            found.add(f"{path}:{line}", value)
    except (ValueError, RecursionError) as error:
        found.problems.append(_malformed(path, text, place, error))
    return found


def _elements(text: str, start: int) -> Iterator[tuple[int, object]]:
    place = _skip(text, start + 1)
    if text.startswith("]", place):
        return
    while True:
        value, end = _decode(text, place)
        yield place, value
        end = _skip(text, end)
        if text.startswith("]", end):
            break
        if not text.startswith(",", end):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        place = _skip(text, end + 1)
    if _skip(text, 0) == start and _skip(text, end + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, _skip(text, end + 1))


def _value_place(text: str, start: int, wanted: str) -> int:
    """Return where the value of a key begins in an object that is known to be well formed."""
    place = _skip(text, start + 1)
    while True:
        key, end = _DECODER.raw_decode(text, place)
        value_at = _skip(text, _skip(text, end) + 1)
        if key == wanted:
            return value_at
        _, end = _DECODER.raw_decode(text, value_at)
        place = _skip(text, _skip(text, end) + 1)


def _lines(path: Path, text: str) -> Found:
    # Not splitlines(): JSON may hold U+2028 and its like inside a string.
    found = Found()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            found.add(where, _DECODER.decode(line))
        except (ValueError, RecursionError) as error:
            found.problems.append(DataError(_reason(error), file=where, found=_excerpt(line)))
    return found


def _decode(text: str, place: int) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, place)
    except RecursionError as error:
        raise ValueError("objects are nested too deeply") from error


def _is_json(line: str) -> bool:
    try:
        _DECODER.decode(line)
    except (ValueError, RecursionError):
        return False
    return True


def _malformed(path: Path, text: str, place: int, error: Exception) -> DataError:
    at = error.pos if isinstance(error, json.JSONDecodeError) else place
    line = text[text.rfind("\n", 0, at) + 1 :].partition("\n")[0]
    return DataError(_reason(error), file=f"{path}:{_line(text, at)}", found=_excerpt(line))


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON: {error.msg} at column {error.colno}"
    return f"malformed JSON: {error}"


def _excerpt(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 60 else f"{line[:60]}…")


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _refuse_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise DataError("has no splits", file=path, found=f"#{split}")
