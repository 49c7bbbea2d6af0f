"""Compare the forget, retain and holdout sets before anything is trained.

What cannot work is refused (``check_sets``); what may be meant is noted (``set_notes``).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from orthomerge.errors import DataError, OrthoMergeError
from orthomerge.unlearning.data.rows import Row, faults, turns_of

__all__ = ["SetNote", "check_sets", "normalised", "set_notes"]

_SHOWN = 5
_Rows = Sequence[Row]
_Pair = tuple[Row, Row]
_Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetNote:
    """Something about the sets that their owner should know.

    Args:
        text: What it is, one sentence.
        count: How many rows it concerns.
        places: Where, the first few: ``"file:line"``, or two of them joined by ``=``.
    """

    text: str
    count: int
    places: tuple[str, ...] = ()


def normalised(text: str) -> str:
    """Return text as it is compared: NFKC, case folded, white space runs as one space.

    >>> normalised("  The CAPITAL\\n of Ｆrance")
    'the capital of france'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_sets(
    forget: _Rows, retain: _Rows | None = None, holdout: _Rows | None = None
) -> list[OrthoMergeError]:
    """Return everything that keeps the sets from being used together.

    Refused are empty sets, unsound rows, and rows that are in the forget set and in another one,
    compared as ``normalised`` texts: what shall be kept cannot be forgotten too, and what is
    trained on is no holdout.

    Args:
        forget: What is to be forgotten.
        retain: What is to be kept, if there is such a set.
        holdout: Rows that are never trained on, if there are such.

    Returns:
        One error per problem; none if the sets are sound.
    """
    sets = _given(forget, retain, holdout)
    problems: list[OrthoMergeError] = []
    for name, rows in sets.items():
        if not rows:
            problems.append(DataError(f"the {name} set is empty"))
        for row in rows:
            problems += [DataError(fault, file=row.where or None) for fault in faults(row)]
    for name, rows in sets.items():
        shared = [] if name == "forget" else _shared(forget, rows, _whole)
        if shared:
            count = len({id(row) for row, _ in shared})
            problems.append(
                DataError(
                    f"the forget set shares {_counted(count, 'row')} with the {name} set",
                    found=_listed(shared),
                    remedy=f"Take {'it' if count == 1 else 'them'} out of one of the two.",
                )
            )
    return problems


def set_notes(
    forget: _Rows, retain: _Rows | None = None, holdout: _Rows | None = None
) -> list[SetNote]:
    """Return what is allowed and yet worth a look.

    Rows that occur several times in one set; a question that the forget set and another one answer
    differently; the same answer to different questions in both; rows of the holdout that are
    retained; columns that were not read; rows with weights.

    Args:
        forget: What is to be forgotten.
        retain: What is to be kept, if there is such a set.
        holdout: Rows that are never trained on, if there are such.
    """
    sets = _given(forget, retain, holdout)
    return [
        *(note for name, rows in sets.items() for note in _notes_on_one(name, rows)),
        *(
            note
            for name, rows in sets.items()
            if name != "forget"
            for note in _notes_on_two(forget, name, rows)
        ),
        *_pair_note(
            "the retain set shares {} with the holdout, which is then no set of unseen rows",
            "row",
            _shared(sets.get("retain", ()), sets.get("holdout", ()), _whole),
        ),
    ]


def _notes_on_one(name: str, rows: _Rows) -> Iterator[SetNote]:
    first: dict[_Key, Row] = {}
    twice: list[_Pair] = []
    for row in rows:
        earlier = first.setdefault(_whole(row), row)
        if earlier is not row:
            twice.append((row, earlier))
    yield from _pair_note(f"the {name} set repeats {{}}", "row", twice)
    unused = dict.fromkeys(column for row in rows for column in row.unused)
    if unused:
        count = sum(bool(row.unused) for row in rows)
        columns = ", ".join(f"'{column}'" for column in unused)
        yield SetNote(f"the {name} set has columns that are not read: {columns}", count)
    weighted = [row for row in rows if row.weight != 1]
    if weighted:
        places = tuple(row.where for row in weighted[:_SHOWN])
        yield SetNote(f"the {name} set weights its rows", len(weighted), places)


def _notes_on_two(forget: _Rows, name: str, rows: _Rows) -> Iterator[SetNote]:
    same_question = [
        pair for pair in _shared(forget, rows, _question) if _whole(pair[0]) != _whole(pair[1])
    ]
    yield from _pair_note(
        f"the forget and the {name} set answer {{}} differently", "question", same_question
    )
    same_answer = [
        pair for pair in _shared(forget, rows, _answer) if _question(pair[0]) != _question(pair[1])
    ]
    yield from _pair_note(
        f"the forget and the {name} set share {{}} to different questions", "answer", same_answer
    )


def _pair_note(text: str, noun: str, pairs: Sequence[_Pair]) -> list[SetNote]:
    if not pairs:
        return []
    count = len({id(row) for row, _ in pairs})
    places = tuple(f"{one.where} = {other.where}" for one, other in pairs[:_SHOWN])
    return [SetNote(text.format(_counted(count, noun)), count, places)]


def _given(forget: _Rows, retain: _Rows | None, holdout: _Rows | None) -> dict[str, _Rows]:
    named = {"forget": forget, "retain": retain, "holdout": holdout}
    return {name: rows for name, rows in named.items() if rows is not None}


def _shared(some: _Rows, others: _Rows, key: Callable[[Row], _Key]) -> list[_Pair]:
    """Return each row of ``some`` with the first of ``others`` that has the same key."""
    places: dict[_Key, Row] = {}
    for row in others:
        places.setdefault(key(row), row)
    pairs = ((row, places.get(key(row))) for row in some if key(row))
    return [(row, other) for row, other in pairs if other is not None]


def _whole(row: Row) -> _Key:
    """Return all that is said; a question with its answer is the chat of these two turns."""
    if row.kind == "text":
        return ("text", normalised(row.text or ""))
    turns = [turn for turn in turns_of(row) if turn.role != "system"]
    return tuple(f"{turn.role}:{normalised(turn.content)}" for turn in turns)


def _question(row: Row) -> _Key:
    """Return all but the last turn; nothing for text, and where nothing is asked."""
    asked = () if row.kind == "text" else _whole(row)[:-1]
    return asked if any(part.partition(":")[2] for part in asked) else ()


def _answer(row: Row) -> _Key:
    """Return the last turn, if it is the assistant's."""
    return tuple(part for part in _whole(row)[-1:] if part.startswith("assistant:"))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _listed(pairs: Sequence[_Pair]) -> str:
    shown = [f"{one.where} = {other.where}" for one, other in pairs[:_SHOWN]]
    more = len(pairs) - _SHOWN
    return "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])])
