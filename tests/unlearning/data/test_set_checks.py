"""Comparing forget, retain and holdout; refusals in place of answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orthomerge.errors import DataError, ProblemsError
from orthomerge.unlearning.data import (
    REFUSALS,
    Message,
    Row,
    alternate_rows,
    check_sets,
    normalised,
    set_notes,
)


def qa(place: str, question: str, answer: str, **options: object) -> Row:
    return Row("qa", prompt=question, answer=answer, where=place, **options)  # type: ignore[arg-type]


FORGET = [qa("f:1", "Who wrote it?", "Mira."), qa("f:2", "Where was she born?", "In Lisbon.")]
RETAIN = [qa("r:1", "Who painted it?", "Jon."), qa("r:2", "Where did he live?", "In Riga.")]
HOLDOUT = [qa("h:1", "Who sang it?", "Lea.")]


def test_sound_sets_have_no_problems_and_no_notes() -> None:
    assert check_sets(FORGET, RETAIN, HOLDOUT) == []
    assert check_sets(FORGET) == []
    assert set_notes(FORGET, RETAIN, HOLDOUT) == []
    assert set_notes(FORGET) == []
    assert set_notes(FORGET, FORGET[:1]) == [], "refused, so not noted too"


def test_comparison_ignores_case_space_and_form() -> None:
    assert normalised(" STRASSE\n\tＡ ﬁne ") == normalised("straße a fine")
    assert normalised("a b") != normalised("ab")


@pytest.mark.parametrize(
    "same",
    [
        qa("x:9", "who  WROTE it?\n", "mira."),
        Row("completion", prompt="Who wrote it?", answer="Mira.", where="x:9"),
        Row(
            "chat",
            messages=(
                Message("system", "Be kind."),
                Message("user", "Who wrote it?"),
                Message("assistant", "Mira."),
            ),
            where="x:9",
        ),
    ],
    ids=["spelling", "completion", "chat"],
)
@pytest.mark.parametrize("name", ["retain", "holdout"])
def test_a_row_of_two_sets_is_refused_with_both_places(same, name) -> None:
    sets = {"retain": RETAIN, "holdout": HOLDOUT}
    sets[name] = [*sets[name], same]
    (problem,) = check_sets(FORGET, **sets)
    assert isinstance(problem, DataError)
    assert problem.problem == f"the forget set shares 1 row with the {name} set"
    assert problem.found == "f:1 = x:9"


def test_texts_overlap_too_but_not_with_answers() -> None:
    text = Row("text", text="Who wrote  it?", where="f:1")
    assert check_sets([text], [replace(text, text="who wrote it?", where="r:1")])[0].found == (
        "f:1 = r:1"
    )
    assert check_sets([text], [Row("completion", prompt="", answer="Who wrote it?")]) == []


def test_the_first_five_places_are_shown_and_all_counted() -> None:
    forget = [qa(f"f:{i}", f"Question {i}?", "x") for i in range(8)]
    retain = [replace(row, where=f"r:{row.where[2:]}") for row in reversed(forget[1:])]
    (problem,) = check_sets(forget, retain)
    assert problem.problem == "the forget set shares 7 rows with the retain set"
    assert problem.found == "; ".join([*(f"f:{i} = r:{i}" for i in range(1, 6)), "and 2 more"])


def test_all_problems_come_together() -> None:
    bad = qa("f:3", "Why?", " ")
    problems = check_sets([*FORGET, bad], [], [FORGET[1], replace(bad, where="h:2", weight=-1.0)])
    assert [str(problem).partition(" (")[0] for problem in problems] == [
        "f:3: its answer is empty",
        "the retain set is empty",
        "h:2: its weight is -1.0, not a finite number above zero",
        "h:2: its answer is empty",
        "the forget set shares 2 rows with the holdout set",
    ]


def test_what_may_be_meant_is_noted() -> None:
    forget = [*FORGET, replace(FORGET[0], where="f:3", prompt="WHO wrote it?")]
    retain = [
        *RETAIN,
        qa("r:3", "Who wrote it?", "Nobody."),
        qa("r:4", "Where is the tower?", "in lisbon."),
        replace(RETAIN[0], unused=("topic", "url"), where="r:5"),
        qa("r:6", "How?", "So.", weight=2.0),
    ]
    holdout = [*HOLDOUT, replace(RETAIN[1], where="h:2")]
    assert check_sets(forget, retain, holdout) == []
    notes = {note.text: (note.count, note.places) for note in set_notes(forget, retain, holdout)}
    assert notes == {
        "the forget set repeats 1 row": (1, ("f:3 = f:1",)),
        "the retain set repeats 1 row": (1, ("r:5 = r:1",)),
        "the retain set has columns that are not read: 'topic', 'url'": (1, ()),
        "the retain set weights its rows": (1, ("r:6",)),
        "the forget and the retain set answer 2 questions differently": (
            2,
            ("f:1 = r:3", "f:3 = r:3"),
        ),
        "the forget and the retain set share 1 answer to different questions": (
            1,
            ("f:2 = r:4",),
        ),
        "the retain set shares 1 row with the holdout, which is then no set of unseen rows": (
            1,
            ("r:2 = h:2",),
        ),
    }


# ------------------------------------------------------------------ refusals


def test_refusals_are_many_and_different() -> None:
    assert len({normalised(sentence) for sentence in REFUSALS}) == len(REFUSALS) >= 50
    assert all(sentence.endswith(".") and len(sentence) < 80 for sentence in REFUSALS)


def test_alternates_answer_the_same_questions() -> None:
    rows = [
        FORGET[0],
        replace(FORGET[1], alternate="No idea."),
        Row("completion", prompt="Once ", answer="upon", where="f:3"),
    ]
    others = alternate_rows(rows, seed=0)
    assert [row.prompt for row in others] == [row.prompt for row in rows]
    assert [row.where for row in others] == [row.where for row in rows]
    assert others[1].answer == "No idea."
    assert {others[0].answer, others[2].answer} <= set(REFUSALS)


def test_the_last_turn_of_a_chat_is_replaced_and_alone_scored() -> None:
    turns = (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
        Message("user", "thanks"),
    )
    (row,) = alternate_rows([Row("chat", messages=turns)], seed=0, refusals=["No."])
    assert [(turn.content, turn.scored) for turn in row.messages or ()] == [
        ("a", False),
        ("b", False),
        ("c", False),
        ("No.", True),
    ]


def test_the_choice_is_seeded_and_spread() -> None:
    rows = [qa(f"f:{i}", f"Question {i}?", "x") for i in range(500)]
    chosen = [row.answer for row in alternate_rows(rows, seed=3)]
    assert chosen == [row.answer for row in alternate_rows(rows, seed=3)]
    assert chosen != [row.answer for row in alternate_rows(rows, seed=4)]
    assert chosen[:10] == [row.answer for row in alternate_rows(rows[:10], seed=3)]
    assert set(chosen) == set(REFUSALS)


def test_the_choice_is_the_same_on_every_machine() -> None:
    rows = [qa(f"f:{i}", f"Question {i}?", "x") for i in range(6)]
    chosen = [row.answer for row in alternate_rows(rows, seed=0, refusals="abcdefghij")]
    assert "".join(map(str, chosen)) == "fbedgc"


def test_text_has_nothing_to_refuse() -> None:
    text = Row("text", text="x", where="f:1")
    with pytest.raises(ProblemsError, match="f:1: plain text asks no question"):
        alternate_rows([text, FORGET[0], text], seed=0)
    with pytest.raises(DataError, match="no refusals"):
        alternate_rows(FORGET, seed=0, refusals=[])
