"""A set as the training loop reads it: one example of ids and labels per place.

How rows become tokens is in encoding.py; here is what fits into ``max_length`` and what does not.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from orthomerge.errors import DataError, OrthoMergeError, RecipeError, UnknownNameError, combined
from orthomerge.unlearning.data.encoding import IGNORED, Encoded, Encoder
from orthomerge.unlearning.data.rows import Row, faults
from orthomerge.unlearning.data.templates import Rendered, Template, render

__all__ = ["LongText", "TokenisedSet", "Truncation", "tokenise"]

LongText = Literal["split", "cut"]
_SHORTEST = 4


@dataclass(frozen=True, slots=True)
class Truncation:
    """A row that was cut at its end.

    Args:
        index: Its place in the set.
        where: ``"file:line"``.
        length: Its tokens before the cut.
        lost: How many scored tokens were cut off.
    """

    index: int
    where: str
    length: int
    lost: int


@dataclass(frozen=True)
class TokenisedSet:
    """A map-style data set of token ids and labels.

    ``set[i]`` is ``{"input_ids": […], "labels": […], "row": i}``, and ``"weight"`` too if any row
    of the set has one that is not 1.

    Args:
        name: What it is called in reports.
        rows: The row behind each example; the pieces of one long text share theirs.
        examples: Ids and labels.
        truncated: The rows that were cut.
        rendered: The text behind each example, as the tokenizer got it.
    """

    name: str
    rows: tuple[Row, ...]
    examples: tuple[Encoded, ...]
    truncated: tuple[Truncation, ...]
    rendered: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        example = self.examples[index]
        item: dict[str, Any] = {"input_ids": list(example.ids), "labels": list(example.labels)}
        item["row"] = index
        if self.is_weighted:
            item["weight"] = self.rows[index].weight
        return item

    @functools.cached_property
    def is_weighted(self) -> bool:
        """Whether any row has a weight other than 1."""
        return any(row.weight != 1 for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(len(example.ids) for example in self.examples)

    @property
    def scored_tokens(self) -> int:
        """Tokens that are predicted and scored; the first of a row is never predicted."""
        return sum(label != IGNORED for example in self.examples for label in example.labels[1:])

    def texts(self) -> list[str]:
        """Return the text behind each example; the pieces of one long text give all of it."""
        return list(self.rendered)

    def prompt_ids(self, index: int) -> list[int]:
        """Return the tokens before the last answer: what to generate from."""
        example = self.examples[index]
        begin = len(example.labels)
        while begin and example.labels[begin - 1] == IGNORED:
            begin -= 1
        while begin and example.labels[begin - 1] != IGNORED:
            begin -= 1
        return list(example.ids[:begin])


def tokenise(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    template: Template = "auto",
    name: str = "rows",
    long_text: LongText = "split",
) -> TokenisedSet:
    """Turn rows into ids and labels.

    Scored are the answer (every assistant turn of a chat) and the token that ends it, or all of a
    text. A row of more than ``max_length`` tokens loses its end, and is listed in ``truncated``; a
    text loses nothing: it becomes several examples of nearly equal length, each begun as a text is
    (with BOS, where there is one), unless ``long_text`` is ``"cut"``.

    Args:
        rows: At least one.
        tokenizer: A transformers tokenizer, fast or not. It needs no padding token.
        max_length: Most tokens of an example, at least 4 beyond BOS.
        template: ``"auto"``: the tokenizer's chat template for ``qa`` and ``chat``, if it has one;
            ``"chat"``: for ``completion`` too; ``"plain"``: never.
        name: What the set is called in reports.
        long_text: What becomes of a text that is too long.

    Returns:
        The set, in the order of the rows.

    Raises:
        RecipeError: ``max_length``, ``template`` or ``long_text`` is not valid.
        DataError: A row is not sound, its template refuses it, or its answer is cut off completely.
        ProblemsError: Several rows are such.
    """
    _check_room(max_length, 0)
    if long_text not in get_args(LongText):
        raise UnknownNameError("treatment of long texts", long_text, get_args(LongText))
    if not rows:
        raise DataError(f"the {name} set is empty")
    rendered = _rendered(rows, tokenizer, template)
    encoder = Encoder(tokenizer)
    _check_room(max_length, len(encoder.before))
    builder = _Builder(max_length, len(encoder.before) if long_text == "split" else None)
    places = [row.where for row in rows]
    for row, text, encoded in zip(rows, rendered, encoder.encode(rendered, places), strict=True):
        builder.add(row, text.text, encoded)
    if builder.problems:
        raise combined(builder.problems)
    return TokenisedSet(
        name,
        tuple(builder.rows),
        tuple(builder.examples),
        tuple(builder.truncated),
        tuple(builder.texts),
    )


def _check_room(max_length: int, taken: int) -> None:
    """Refuse lengths that leave no room behind the tokens that begin every text."""
    fewest = _SHORTEST + taken
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < fewest:
        raise RecipeError("max_length is too short", expected=f">= {fewest}", found=max_length)


def _rendered(rows: Sequence[Row], tokenizer: Any, template: Template) -> list[Rendered]:
    rendered: list[Rendered] = []
    problems: list[OrthoMergeError] = []
    for row in rows:
        wrong = faults(row)
        if wrong:
            problems += [DataError(fault, file=row.where or None) for fault in wrong]
            continue
        try:
            rendered.append(render(row, tokenizer, template))
        except DataError as error:
            problems.append(error)
    if problems:
        raise combined(problems)
    return rendered


class _Builder:
    """Collect examples that fit, and what is wrong with the others.

    Args:
        max_length: Most tokens of an example.
        begin: Tokens that begin every piece of a long text, or None if texts are cut like others.
    """

    def __init__(self, max_length: int, begin: int | None) -> None:
        self._max_length, self._begin = max_length, begin
        self.rows: list[Row] = []
        self.examples: list[Encoded] = []
        self.truncated: list[Truncation] = []
        self.texts: list[str] = []
        self.problems: list[OrthoMergeError] = []

    def add(self, row: Row, text: str, encoded: Encoded) -> None:
        """Take one row: whole, in pieces, or cut."""
        length = len(encoded.ids)
        if length > self._max_length and row.kind == "text" and self._begin is not None:
            for piece in _pieces(encoded, self._max_length, self._begin):
                self._keep(row, text, piece)
            return
        whole = encoded
        if length > self._max_length:
            encoded = Encoded(encoded.ids[: self._max_length], encoded.labels[: self._max_length])
        if not _scored(encoded):
            self.problems.append(self._unscored(row, whole))
            return
        if encoded is not whole:
            lost = _scored(whole) - _scored(encoded)
            self.truncated.append(Truncation(len(self.rows), row.where, length, lost))
        self._keep(row, text, encoded)

    def _keep(self, row: Row, text: str, encoded: Encoded) -> None:
        self.rows.append(row)
        self.texts.append(text)
        self.examples.append(encoded)

    def _unscored(self, row: Row, whole: Encoded) -> DataError:
        if not _scored(whole):
            return DataError(
                "nothing of it can be predicted: it is one token, with none before it",
                file=row.where or None,
                remedy="Give it a prompt, or take the row out.",
            )
        first = next(i for i, label in enumerate(whole.labels) if i and label != IGNORED)
        return DataError(
            "its answer is cut off completely",
            file=row.where or None,
            expected=f"max_length of {len(whole.ids)} for all of it, more than {first} for a start",
            found=f"max_length {self._max_length}",
            remedy="Raise max_length, or shorten the prompt.",
        )


def _pieces(encoded: Encoded, max_length: int, begin: int) -> Iterator[Encoded]:
    """Yield a text in as few pieces as fit, of lengths that differ by at most one."""
    head = Encoded(encoded.ids[:begin], encoded.labels[:begin])
    length, room = len(encoded.ids) - begin, max_length - begin
    count = math.ceil(length / room)
    cuts = [begin + length * number // count for number in range(count + 1)]
    for start, end in itertools.pairwise(cuts):
        yield Encoded(head.ids + encoded.ids[start:end], head.labels + encoded.labels[start:end])


def _scored(encoded: Encoded) -> int:
    """Return how many tokens are both predicted and scored."""
    return sum(label != IGNORED for label in encoded.labels[1:])
