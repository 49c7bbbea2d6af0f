"""Which columns of a file mean what: the shapes of rows that are recognised, and `keys`.

The shape is decided once per file, by the records themselves; reading cells is in cells.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orthomerge.errors import DataError, RecipeError, UnknownNameError, nearest
from orthomerge.unlearning.data.records import Record
from orthomerge.unlearning.data.rows import Kind

__all__ = ["NAMES", "SHAPES", "Columns", "Shape", "choose_columns"]

#: What a column can be -> the names under which it is found without being told.
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "question": ("question",),
    "answer": ("answer",),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "prompt": ("prompt",),
    "completion": ("completion", "response", "gt"),
    "text": ("text",),
    "id": ("id",),
    "weight": ("weight",),
    "paraphrases": ("paraphrases", "paraphrased_question"),
    "paraphrased_answers": ("paraphrased_answers", "paraphrased_answer"),
    "perturbed": ("perturbed", "perturbed_answer"),
    "alternate": ("alternate",),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write a row.

    Args:
        kind: What the row becomes.
        needed: What every record must have.
        optional: What it may have beside.
    """

    kind: Kind
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


#: In order of preference, for records that fit several.
SHAPES = (
    Shape("chat", ("messages",)),
    Shape("qa", ("question", "answer")),
    Shape("qa", ("instruction", "output"), ("input",)),
    Shape("completion", ("prompt", "completion")),
    Shape("text", ("text",)),
)
_EXTRAS = ("id", "weight", "paraphrases", "paraphrased_answers", "perturbed", "alternate")
_OF_SHAPES = {role for shape in SHAPES for role in (*shape.needed, *shape.optional)}


@dataclass(frozen=True)
class Columns:
    """How the records of one file are read.

    Args:
        shape: What every record is.
        keys: What a column is -> the column that the caller names for it.
    """

    shape: Shape
    keys: Mapping[str, str]

    def of(self, record: Record) -> dict[str, str]:
        """Return what each used column of a record is -> the column's name in that record."""
        wanted = (*self.shape.needed, *self.shape.optional, *_EXTRAS)
        found = {role: _column(role, record.values, self.keys) for role in wanted}
        return {role: column for role, column in found.items() if column is not None}


def choose_columns(
    records: Sequence[Record], keys: Mapping[str, str] | None, *, file: str
) -> Columns:
    """Decide what the records of a file are: the shape that most of them fit.

    Args:
        records: At least one.
        keys: What a column is -> its name in the file, where that is not one of ``NAMES``.
        file: Named in errors.

    Raises:
        UnknownNameError: ``keys`` names something that a column cannot be, or an absent column.
        RecipeError: ``keys`` mixes shapes, or names a column twice.
        DataError: No record fits any shape; lists the columns found.
    """
    keys = dict(keys or {})
    present = _present(records)
    _check_keys(keys, present, file)
    candidates = _candidates(keys, file)
    fitting = {
        place: sum(_fits(shape, record, keys) for record in records)
        for place, shape in enumerate(candidates)
    }
    best = max(fitting, key=lambda place: (fitting[place], -place))
    if not fitting[best]:
        raise _unrecognised(file, present, keys, candidates)
    return Columns(candidates[best], keys)


def _fits(shape: Shape, record: Record, keys: Mapping[str, str]) -> bool:
    return all(_column(role, record.values, keys) is not None for role in shape.needed)


def _column(role: str, values: Mapping[str, object], keys: Mapping[str, str]) -> str | None:
    """Return the column that plays a role: as named, else exactly, else whatever its case."""
    if role in keys:
        return keys[role] if keys[role] in values else None
    for name in NAMES[role]:
        if name in values:
            return name
    taken = set(keys.values())
    for name in NAMES[role]:
        for column in values:
            if column not in taken and column.strip().lower() == name:
                return column
    return None


def _present(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(column for record in records for column in record.values))


def _check_keys(keys: Mapping[str, str], present: Sequence[str], file: str) -> None:
    for role, column in keys.items():
        if role not in NAMES:
            raise UnknownNameError("key", role, NAMES, file=file)
        if column not in present:
            raise UnknownNameError("column", column, present, file=file)
    twice = [column for column in keys.values() if list(keys.values()).count(column) > 1]
    if twice:
        raise RecipeError("keys name one column for two things", file=file, found=twice[0])


def _candidates(keys: Mapping[str, str], file: str) -> list[Shape]:
    named = set(keys) & _OF_SHAPES
    candidates = [shape for shape in SHAPES if named <= {*shape.needed, *shape.optional}]
    if candidates:
        return candidates
    raise RecipeError(
        "keys mix different kinds of rows",
        file=file,
        expected=" or ".join("/".join(shape.needed) for shape in SHAPES),
        found=", ".join(sorted(named)),
    )


def _unrecognised(
    file: str, present: Sequence[str], keys: Mapping[str, str], candidates: Sequence[Shape]
) -> DataError:
    shape = candidates[0] if keys and set(keys) & _OF_SHAPES else SHAPES[1]
    free = [column for column in present if column not in keys.values()]
    example = dict(keys)
    for role in shape.needed:
        if role not in example:
            guess = nearest(role, free) or f"<column with the {role}>"
            example[role] = guess
            free = [column for column in free if column != guess]
    mapping = ", ".join(f"{role}: {column}" for role, column in example.items())
    return DataError(
        "its columns are none that are known",
        file=file,
        expected=" or ".join("/".join(shape.needed) for shape in candidates),
        found=", ".join(present) or "no columns",
        remedy=f"Say which column is which with keys, e.g. keys: {{{mapping}}}.",
    )
