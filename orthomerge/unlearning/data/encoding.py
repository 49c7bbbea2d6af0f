"""From rendered text to token ids and labels: which tokens are the answer's, BOS, EOS.

Nothing is truncated and nothing is batched here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orthomerge.errors import DataError
from orthomerge.unlearning.data.templates import Rendered, Span

__all__ = ["IGNORED", "Encoded", "Encoder"]

#: Label of a token that is not scored, as torch's cross entropy knows it.
IGNORED = -100
_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row, and a label per token: its id where it is scored, else ``IGNORED``."""

    ids: list[int]
    labels: list[int]


class Encoder:
    """Turn rendered rows into ids and labels with one tokenizer.

    A token is the answer's if it holds a character of the answer, so that one that merges the last
    of the prompt with the first of the answer is scored. A tokenizer that is not fast cannot say
    which characters a token holds: the ids of the prompt alone must then begin those of the whole.

    Special tokens: a chat template brings its own. Else the row gets what the tokenizer puts before
    a text, once; behind an answer comes what it puts behind a text, and EOS. Behind a templated
    answer the end-of-turn token is the answer's; if the template has none, EOS takes its place. A
    text row is no whole document: no EOS behind it.

    Args:
        tokenizer: A transformers tokenizer, fast or not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._eos: int | None = tokenizer.eos_token_id
        self._before, behind = _added_around(tokenizer)
        if self._eos is not None and self._eos not in behind:
            behind = [*behind, self._eos]
        self._behind = behind
        self._markers = {*tokenizer.all_special_ids, *_added_ids(tokenizer)}

    @property
    def before(self) -> list[int]:
        """What stands before every text, such as BOS."""
        return list(self._before)

    def encode(self, rows: Sequence[Rendered], places: Sequence[str]) -> Iterator[Encoded]:
        """Yield ids and labels of each row; ``places`` say where each is from.

        Raises:
            DataError: A tokenizer that is not fast merges across the border of an answer.
        """
        encode = self._with_offsets if self._tokenizer.is_fast else self._by_prefixes
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            for row, (ids, spans) in zip(
                part, encode(part, places[start : start + _AT_ONCE]), strict=True
            ):
                yield self._finished(row, ids, spans)

    def _with_offsets(
        self, rows: Sequence[Rendered], places: Sequence[str]
    ) -> Iterator[tuple[list[int], list[Span]]]:
        batch = self._tokenizer(
            [row.text for row in rows],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for row, ids, offsets in zip(
            rows, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            yield list(ids), [_tokens_of(answer, offsets) for answer in row.answers]

    def _by_prefixes(
        self, rows: Sequence[Rendered], places: Sequence[str]
    ) -> Iterator[tuple[list[int], list[Span]]]:
        for row, where in zip(rows, places, strict=True):
            ids = self._ids(row.text)
            spans = [
                (self._border(row.text, begin, ids, where), self._border(row.text, end, ids, where))
                for begin, end in row.answers
            ]
            yield ids, spans

    def _border(self, text: str, place: int, ids: list[int], where: str) -> int:
        """Return the number of tokens before a character."""
        start = self._ids(text[:place])
        if ids[: len(start)] == start:
            return len(start)
        raise DataError(
            "the tokenizer merges the end of the prompt with the start of the answer",
            file=where,
            found=repr(text[max(0, place - 10) : place + 10]),
            remedy="Use a fast tokenizer, or part prompt and answer by a space or line break.",
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _finished(self, row: Rendered, ids: list[int], spans: list[Span]) -> Encoded:
        """Add special tokens, extend each answer to its end, drop what is behind the last one."""
        if row.templated:
            ids, spans = self._closed(ids, spans)
        elif row.ends:
            behind = self._behind[1:] if ids[-1:] == self._behind[:1] else self._behind
            spans = [*spans[:-1], (spans[-1][0], len(ids) + len(behind))]
            ids = [*ids, *behind]
        labels = [IGNORED] * len(ids)
        for begin, end in spans:
            labels[begin:end] = ids[begin:end]
        if not row.templated and self._before and ids[: len(self._before)] != self._before:
            ids, labels = [*self._before, *ids], [IGNORED] * len(self._before) + labels
        return Encoded(ids, labels)

    def _closed(self, ids: list[int], spans: list[Span]) -> tuple[list[int], list[Span]]:
        """Extend templated answers by the token that ends the last one."""
        last = self._marker_at(ids, spans[-1][1], self._markers)
        if last is None:
            end = spans[-1][1]
            eos = [] if self._eos is None else [self._eos]
            return [*ids[:end], *eos], [*spans[:-1], (spans[-1][0], end + len(eos))]
        # Not any marker: what follows an earlier answer may be the next turn's begin.
        ends = [self._marker_at(ids, end, {ids[last]}) for _, end in spans]
        closed = [
            (begin, end if marker is None else marker + 1)
            for (begin, end), marker in zip(spans, ends, strict=True)
        ]
        return ids[: last + 1], closed

    def _marker_at(self, ids: list[int], start: int, markers: set[int]) -> int | None:
        """Return the first token from ``start`` if it is a marker; white space may come before."""
        for place in range(start, len(ids)):
            if ids[place] in markers:
                return place
            if self._tokenizer.decode([ids[place]]).strip():
                return None
        return None


def _tokens_of(answer: Span, offsets: Sequence[Span]) -> Span:
    """Return the first and the end token that hold a character of the answer.

    Byte-level tokenizers leave leading spaces out of the offsets, so that a token of nothing but
    spaces is empty and stands where its spaces end.
    """
    begin, end = answer
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > begin), len(offsets))
    for place in range(first, len(offsets)):
        start, stop = offsets[place]
        if start >= end and not start == stop == end:
            return first, place
    return first, len(offsets)


def _added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and behind a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for place in range(len(whole) - len(bare) + 1):
        if bare and whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    raise DataError(
        "the tokenizer does not say which special tokens it adds around a text",
        expected="tokens of 'a' to be part of the tokens of 'a' with special tokens",
        found=f"{bare} and {whole}",
    )


def _added_ids(tokenizer: Any) -> set[int]:
    return {int(token) for token in getattr(tokenizer, "added_tokens_decoder", {})}
