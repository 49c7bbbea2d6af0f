"""Read the cells of one record into a row; every problem of the record is kept.

Nothing is guessed: a null, a list or a float where text must be is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from orthomerge.errors import DataError
from orthomerge.unlearning.data.chats import messages_from
from orthomerge.unlearning.data.columns import Columns
from orthomerge.unlearning.data.records import Record
from orthomerge.unlearning.data.rows import Row, faults

__all__ = ["read_row"]


def read_row(record: Record, columns: Columns) -> tuple[Row | None, list[DataError]]:
    """Return the row of a record, or what is wrong with it."""
    names = columns.of(record)
    missing = [role for role in columns.shape.needed if role not in names]
    if missing:
        return None, [_unlike_the_others(record, columns, missing)]
    cells = _Cells(record, names)
    row = cells.row(columns)
    if not cells.problems:
        cells.problems += [DataError(fault, file=record.where) for fault in faults(row)]
    return (None, cells.problems) if cells.problems else (row, [])


def _unlike_the_others(record: Record, columns: Columns, missing: list[str]) -> DataError:
    expected = (columns.keys.get(role, role) for role in columns.shape.needed)
    return DataError(
        f"has no {' and no '.join(missing)}, unlike other rows of its file",
        file=record.where,
        expected=", ".join(expected),
        found=", ".join(map(str, record.values)) or "no columns",
        remedy="Put rows of different kinds into different files.",
    )


class _Cells:
    """The cells of one record by what they are, and the problems met while reading them."""

    def __init__(self, record: Record, names: Mapping[str, str]) -> None:
        self._where, self._names, self._values = record.where, names, record.values
        self._unused = [str(name) for name in record.values if name not in names.values()]
        self.problems: list[DataError] = []

    def row(self, columns: Columns) -> Row:
        """Return the row; it is sound only if no problem was met."""
        parts: dict[str, object] = {}
        match columns.shape.needed:
            case ("messages",):
                parts["messages"] = self._messages()
            case ("text",):
                parts["text"] = self._text("text")
            case ("instruction", "output"):
                # As the Alpaca set puts it to the model: the input below its instruction.
                whole = [self._text("instruction"), self._optional("input")]
                parts["prompt"] = "\n\n".join(part for part in whole if part)
                parts["answer"] = self._text("output")
            case (prompt, answer):
                parts["prompt"], parts["answer"] = self._text(prompt), self._text(answer)
        return Row(
            columns.shape.kind,
            where=self._where,
            id=self._optional("id"),
            paraphrases=self._texts("paraphrases"),
            paraphrased_answers=self._texts("paraphrased_answers"),
            perturbed=self._texts("perturbed"),
            alternate=self._optional("alternate"),
            weight=self._weight(),
            unused=tuple(self._unused),
            **parts,  # type: ignore[arg-type]
        )

    def _text(self, role: str) -> str:
        return self._as_text(role, self._values[self._names[role]])

    def _optional(self, role: str) -> str | None:
        """Return text, or None where the column is missing, null or empty."""
        value = self._values[self._names[role]] if role in self._names else None
        return None if value is None or value == "" else self._as_text(role, value)

    def _texts(self, role: str) -> tuple[str, ...]:
        """Return a list of texts; one text is a list of one, and a list may be JSON text."""
        value = self._values[self._names[role]] if role in self._names else None
        if value is None or value == "":
            return ()
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = _list_in(value)
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(self._as_text(role, item) for item in items)

    def _messages(self) -> object:
        messages, problems, unread = messages_from(self._values[self._names["messages"]])
        self._unused += [f"{self._names['messages']}.{key}" for key in sorted(unread)]
        self.problems += [DataError(problem, file=self._where) for problem in problems]
        return messages

    def _weight(self) -> float:
        value = self._values[self._names["weight"]] if "weight" in self._names else None
        if value is None or value == "":
            return 1.0
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            return float(value)
        except (ValueError, OverflowError):
            self._refuse("weight", "a number", value)
            return 1.0

    def _as_text(self, role: str, value: object) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)  # the only number that has one spelling
        self._refuse(role, "text", value)
        return ""

    def _refuse(self, role: str, expected: str, value: object) -> None:
        remedy = None
        if isinstance(value, bool | float):
            remedy = "Write it in quotation marks, spelt as the model shall see it."
        if value is None:
            remedy = "Take the row out, or give the value."
        name = self._names[role]
        shown = "null" if value is None else f"{type(value).__name__} {value!r:.60}"
        self.problems.append(
            DataError(
                f"the column '{name}' is not {expected}",
                file=self._where,
                expected=expected,
                found=shown,
                remedy=remedy,
            )
        )


def _list_in(text: str) -> object:
    """Return the list that a cell holds as JSON, or the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text
