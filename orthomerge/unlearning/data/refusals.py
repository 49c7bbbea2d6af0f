"""What a model may say instead of an answer it is to forget, and rows that say it.

The sentences are general on purpose: none names a subject, so each fits every question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from orthomerge.errors import DataError, combined
from orthomerge.unlearning.data.rows import Message, Row

__all__ = ["REFUSALS", "alternate_rows"]

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is something I can't tell you.",
    "I'm afraid I don't know the answer.",
    "I don't have an answer to that question.",
    "Sorry, I can't help with this one.",
    "This is outside of what I know.",
    "I couldn't say.",
    "I have nothing to say about that.",
    "My knowledge does not reach that far.",
    "I've never learnt anything about this.",
    "I can't give you a reliable answer.",
    "No answer comes to my mind.",
    "I would only be guessing.",
    "You will have to look that up elsewhere.",
    "I'm unable to answer that.",
    "That's unknown to me.",
    "I don't know anything about it.",
    "I lack the knowledge to answer this.",
    "Unfortunately I can't answer your question.",
    "I wish I could help, but I don't know.",
    "I'm not familiar with that.",
    "I haven't heard of this.",
    "There is nothing I can tell you about it.",
    "I must admit that I don't know.",
    "I don't have the facts on this.",
    "This question is beyond me.",
    "I'm not in a position to answer.",
    "Please ask someone who knows; I don't.",
    "I can offer no answer here.",
    "It isn't something I have learnt.",
    "I have to pass on this question.",
    "I don't have that information.",
    "As far as I can tell, I know nothing about this.",
    "Honestly, I have no idea.",
    "I'd rather not guess.",
    "I'm missing what I would need to answer that.",
    "Sorry, I know nothing about that.",
    "I can't recall anything on this subject.",
    "I'm sorry, but that's not known to me.",
    "I don't have any details about that.",
    "That goes beyond what I was taught.",
    "I find nothing in my memory about this.",
    "Regrettably, I don't know.",
    "I'm at a loss here.",
    "My apologies, I can't answer that.",
    "It would be wrong of me to pretend that I know.",
    "I'm not the right one to ask about this.",
    "That's a question I can't answer.",
)


def alternate_rows(
    rows: Sequence[Row], *, seed: int, refusals: Sequence[str] = REFUSALS
) -> list[Row]:
    """Return the same questions, each with something else for an answer.

    The answer is the row's ``alternate`` if it has one, else a refusal chosen by the seed and the
    row's place. In a chat the last assistant turn is replaced, and is the only one that is scored.

    Args:
        rows: The forget set.
        seed: Of the choice.
        refusals: What to choose from.

    Returns:
        As many rows, in the same order.

    Raises:
        DataError: A row is plain text, which asks nothing; or there is nothing to choose from.
        ProblemsError: Several rows are plain text.
    """
    if not refusals:
        raise DataError("there are no refusals to choose from")
    problems = [
        DataError(
            "plain text asks no question that could be refused",
            file=row.where or None,
            remedy="Use an objective that needs no alternate answers, or questions with answers.",
        )
        for row in rows
        if row.kind == "text"
    ]
    if problems:
        raise combined(problems)
    return [
        _answered(row, row.alternate or _chosen(refusals, seed, index))
        for index, row in enumerate(rows)
    ]


def _chosen(refusals: Sequence[str], seed: int, index: int) -> str:
    # Python promises this stream for a seed given as text, on every version and machine.
    return refusals[int(random.Random(f"{seed}:{index}").random() * len(refusals))]


def _answered(row: Row, answer: str) -> Row:
    plain = replace(row, alternate=None, paraphrased_answers=(), perturbed=())
    if row.messages is None:
        return replace(plain, answer=answer)
    last = max(i for i, turn in enumerate(row.messages) if turn.role == "assistant")
    before = (replace(turn, scored=False) for turn in row.messages[:last])
    return replace(plain, messages=(*before, Message("assistant", answer)))
