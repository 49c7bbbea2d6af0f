"""From a row to the text a model sees, and where in it the answers are.

Characters only; tokens are in encoding.py. Without a chat template the format is plain:
``Question: …`` and ``Answer: …`` on lines of their own for ``qa`` and ``chat`` (a system turn as
``System: …``), a prompt and its continuation as they are for ``completion``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from orthomerge.errors import DataError, RecipeError, UnknownNameError
from orthomerge.unlearning.data.rows import Message, Row, turns_of

__all__ = ["Rendered", "Span", "Template", "render", "uses_template"]

Template = Literal["auto", "chat", "plain"]
Span = tuple[int, int]

_LABELS = {"system": "System:", "user": "Question:", "assistant": "Answer:"}
# Some templates print today's date unless they are told one; rows must not change overnight.
_FIXED_DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row.

    Args:
        text: What is tokenised.
        answers: First and end character of each answer that is scored, in order.
        templated: Whether a chat template made it; then it holds its own special tokens.
        ends: Whether the last answer is followed by the end of the sequence.
    """

    text: str
    answers: tuple[Span, ...]
    templated: bool = False
    ends: bool = True


def uses_template(row: Row, tokenizer: Any, template: Template) -> bool:
    """Return whether a row goes through the tokenizer's chat template.

    Args:
        row: Any row.
        tokenizer: A transformers tokenizer.
        template: ``"auto"``: for ``qa`` and ``chat``, if there is one; ``"chat"``: for everything
            but text, and there must be one; ``"plain"``: never.

    Raises:
        UnknownNameError: ``template`` is none of these.
        RecipeError: ``"chat"`` is asked for and the tokenizer has no template.
    """
    if template not in get_args(Template):
        raise UnknownNameError("template", template, get_args(Template))
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_template:
        raise RecipeError(
            "the tokenizer has no chat template", remedy="Use template 'plain' or 'auto'."
        )
    kinds = {"auto": ("qa", "chat"), "chat": ("qa", "chat", "completion"), "plain": ()}[template]
    return has_template and row.kind in kinds


def render(row: Row, tokenizer: Any, template: Template = "auto") -> Rendered:
    """Return the text of a row and where its answers are.

    Args:
        row: A sound row.
        tokenizer: A transformers tokenizer.
        template: See ``uses_template``.

    Raises:
        DataError: The chat template refuses the row, or rewrites its answers.
        RecipeError: See ``uses_template``.
    """
    if row.kind == "text":
        text = row.text or ""
        return Rendered(text, ((0, len(text)),), ends=False)
    if uses_template(row, tokenizer, template):
        return _with_template(row, tokenizer)
    if row.kind == "completion":
        prompt, answer = row.prompt or "", row.answer or ""
        return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))
    return _plain(turns_of(row))


def _plain(turns: Sequence[Message]) -> Rendered:
    """Return one labelled line per turn; the space behind ``Answer:`` belongs to the answer."""
    text, answers = "", []
    for turn in turns:
        text += ("\n" if text else "") + _LABELS[turn.role]
        begin = len(text)
        text += f" {turn.content}"
        if _is_scored(turn):
            answers.append((begin, len(text)))
    # Nothing behind the last answer is learnt from.
    return Rendered(text[: answers[-1][1]], tuple(answers))


def _with_template(row: Row, tokenizer: Any) -> Rendered:
    """Find the answers by rendering twice: as they are, and with a mark in place of each.

    What is around the marks must be around the answers too. So nothing is assumed of the template:
    neither that a shorter chat renders to a prefix of a longer one, nor ``{% generation %}``.
    """
    turns = turns_of(row)
    text = _apply(row, tokenizer, [turn.content for turn in turns])
    pad = "\ue000"
    while pad in text:
        pad += "\ue000"
    marks = [
        f"{pad}\ue001{place}\ue001{pad}" if turn.role == "assistant" else None
        for place, turn in enumerate(turns)
    ]
    marked = _apply(
        row, tokenizer, [mark or turn.content for turn, mark in zip(turns, marks, strict=True)]
    )
    answers = [turn for turn in turns if turn.role == "assistant"]
    around = _around(marked, [mark for mark in marks if mark])
    spans = None if around is None else _aligned(text, around, answers)
    if spans is None:
        raise DataError(
            "the chat template rewrites an answer, so that it cannot be told from the prompt",
            file=row.where,
            remedy="Use template 'plain', or a chat template that keeps answers as they are.",
        )
    scored = [span for span, turn in zip(spans, answers, strict=True) if turn.scored]
    return Rendered(text, tuple(scored), templated=True)


def _apply(row: Row, tokenizer: Any, contents: Sequence[str]) -> str:
    from jinja2.exceptions import TemplateError

    turns = turns_of(row)
    messages = [
        {"role": turn.role, "content": content}
        for turn, content in zip(turns, contents, strict=True)
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, date_string=_FIXED_DATE))
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            "the chat template refuses the row",
            file=row.where,
            found=f"{', '.join(turn.role for turn in turns)}: {error}",
            remedy="Order the turns as the model's template wants them, or use template 'plain'.",
        ) from error


def _around(marked: str, marks: Sequence[str]) -> list[str] | None:
    """Return what is before, between and behind the marks; None if one is not there once."""
    if any(marked.count(mark) != 1 for mark in marks):
        return None
    around, rest = [], marked
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        around.append(before)
    return [*around, rest]


def _aligned(text: str, around: Sequence[str], answers: Sequence[Message]) -> list[Span] | None:
    """Return where the answers are, if the text is ``around`` with the answers in between."""
    if not text.startswith(around[0]):
        return None
    spans, place = [], len(around[0])
    for number, answer in enumerate(answers, start=1):
        behind, is_last = around[number], number == len(answers)
        for shape in _as_templates_trim(answer.content):
            end = place + len(shape)
            rest_fits = text[end:] == behind if is_last else text.startswith(behind, end)
            if text.startswith(shape, place) and rest_fits:
                spans.append((place, end))
                place = end + len(behind)
                break
        else:
            return None
    return spans


def _as_templates_trim(content: str) -> Iterator[str]:
    yield content
    for characters in (None, "\n"):
        yield content.strip(characters)
        yield content.rstrip(characters)
        yield content.lstrip(characters)


def _is_scored(turn: Message) -> bool:
    return turn.role == "assistant" and turn.scored
