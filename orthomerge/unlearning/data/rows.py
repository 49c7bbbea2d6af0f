"""One row of a forget, retain or holdout set, and what makes it usable.

What a row means is here; how files are read is in files.py, how rows become tokens in tokens.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Kind", "Message", "Row", "faults", "turns_of"]

Kind = Literal["qa", "completion", "chat", "text"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Args:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: What is said.
        scored: Whether an assistant's turn is learnt from or forgotten; others never are.
    """

    role: str
    content: str
    scored: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its file gives it, before any tokenizer.

    Args:
        kind: What it is: a question with its answer, a prompt with its continuation, a chat, or
            plain text.
        prompt: The question (``qa``) or prompt (``completion``).
        answer: What follows it.
        messages: The turns of a ``chat``.
        text: The text of a ``text`` row.
        where: ``"file:line"``; of a table without lines (Parquet, Arrow) ``"file:row"``, from 1.
        id: The row's own name, if its file gives one.
        paraphrases: Other forms of the question.
        paraphrased_answers: Other forms of the answer.
        perturbed: Wrong answers of the same form.
        alternate: What the model may say instead.
        weight: Its weight in the mean over rows, finite and above zero.
        unused: Columns of the file that were not read.
    """

    kind: Kind
    prompt: str | None = None
    answer: str | None = None
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    where: str = ""
    id: str | None = None
    paraphrases: tuple[str, ...] = ()
    paraphrased_answers: tuple[str, ...] = ()
    perturbed: tuple[str, ...] = ()
    alternate: str | None = None
    weight: float = 1.0
    unused: tuple[str, ...] = ()


def turns_of(row: Row) -> tuple[Message, ...]:
    """Return a row that asks and answers as the turns of a chat.

    >>> [turn.role for turn in turns_of(Row("qa", prompt="Who?", answer="Ada."))]
    ['user', 'assistant']
    """
    if row.messages is not None:
        return row.messages
    return (Message("user", row.prompt or ""), Message("assistant", row.answer or ""))


def faults(row: Row) -> list[str]:
    """Return what keeps a row from being used; an empty list for a sound one."""
    return list(_faults(row))


def _faults(row: Row) -> Iterator[str]:
    if not math.isfinite(row.weight) or row.weight <= 0:
        yield f"its weight is {row.weight}, not a finite number above zero"
    if row.kind == "text":
        if _is_blank(row.text):
            yield "its text is empty"
    elif row.kind == "chat":
        yield from _chat_faults(row.messages or ())
    else:
        if row.kind == "qa" and _is_blank(row.prompt):
            yield "its question is empty"
        if row.prompt is None:
            yield "it has no prompt"
        if _is_blank(row.answer):
            yield "its answer is empty"


def _chat_faults(messages: tuple[Message, ...]) -> Iterator[str]:
    answers = [turn for turn in messages if turn.role == "assistant" and turn.scored]
    if not answers:
        yield "it has no assistant turn that counts"
    for place, turn in enumerate(messages, start=1):
        if _is_blank(turn.content) and turn.role != "system":
            yield f"turn {place} ({turn.role}) is empty"


def _is_blank(text: str | None) -> bool:
    return text is None or not text.strip()
