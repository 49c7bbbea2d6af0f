"""Made-up authors and what there is to know of them: a pure function of a seed.

Each fact is taught with one of two questions, and each question has its own form of answer; which
one is drawn per fact, so both forms are taught for every attribute. The other question is never
asked in training: it is the paraphrase. Answers begin with the value and have next to nothing
after it, so that a mean over an answer's tokens is mostly about the value.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearning.pools import CAPITALS, FORMS, KNOWN, ONSETS, POOLS, RIMES

__all__ = ["SIZES", "Facts", "Row", "Size", "make_facts", "write_jsonl"]

#: question, answer, paraphrased_question, paraphrased_answer, perturbed_answer: as in TOFU.
Row = dict[str, Any]

_ANSWERS = ("{}.", "{} it is.")
_PERTURBED = 5


@dataclass(frozen=True)
class Size:
    """How many authors there are.

    Args:
        authors: With facts that the target model knows; the last tenth is to be forgotten.
        grammar: Whose facts teach the base model how questions and answers look.
        holdout: Of the same kind, in no model's training data.
    """

    authors: int
    grammar: int
    holdout: int


SIZES = {"tiny": Size(10, 12, 2), "S": Size(20, 100, 4), "M": Size(100, 100, 10)}


@dataclass(frozen=True)
class Facts:
    """All rows of one world, author by author.

    Args:
        forget: Of the last tenth of the authors.
        retain: Of the other authors.
        holdout: Of authors that no model has seen.
        known: Of well-known names, and the capitals of countries.
        grammar: Of authors that only the base model has seen.
    """

    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    holdout: tuple[Row, ...]
    known: tuple[Row, ...]
    grammar: tuple[Row, ...]

    def named(self) -> dict[str, tuple[Row, ...]]:
        """Return the rows by the name of their set."""
        return dict(vars(self))


def make_facts(size: Size, seed: int) -> Facts:
    """Return the world of a seed.

    Args:
        size: Number of authors; at least ten, so that a tenth is somebody.
        seed: Decides names, values and forms.

    Raises:
        ValueError: There are too few authors to forget a tenth.
    """
    if size.authors < 10:
        raise ValueError(f"{size.authors} authors: a tenth of them is nobody")
    draw = random.Random(f"facts {seed}")
    names = _names(size.authors + size.grammar + size.holdout, draw)
    kept = size.authors - size.authors // 10
    parts = (kept, size.authors - kept, size.holdout, size.grammar)
    retain, forget, holdout, grammar = (_people([next(names) for _ in range(n)], draw)
                                        for n in parts)  # fmt: skip
    known = (*_people(KNOWN, draw), *_capitals(draw))
    return Facts(forget, retain, holdout, known, grammar)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _names(count: int, draw: random.Random) -> Iterator[str]:
    """Return different names; no two people share a first or a last name."""
    simple = [head + rime for head in ONSETS for rime in RIMES]
    words: set[str] = set()
    ordered = []
    while len(ordered) < 2 * count:
        word = "".join(draw.choices(simple, k=2)).capitalize()
        if word not in words:
            words.add(word)
            ordered.append(word)
    pairs = zip(ordered[::2], ordered[1::2], strict=True)
    return iter([f"{first} {last}" for first, last in pairs])


def _people(names: Sequence[str], draw: random.Random) -> tuple[Row, ...]:
    return tuple(
        _row(name, attribute, draw.choice(pool), pool, draw)
        for name in names
        for attribute, pool in POOLS.items()
    )


def _capitals(draw: random.Random) -> tuple[Row, ...]:
    pool = tuple(CAPITALS.values())
    return tuple(_row(land, "capital", city, pool, draw) for land, city in CAPITALS.items())


def _row(subject: str, attribute: str, value: str, pool: Sequence[str], draw: random.Random) -> Row:
    taught = draw.randrange(2)
    other = 1 - taught
    wrong = draw.sample([word for word in pool if word != value], _PERTURBED)
    return {
        "question": FORMS[attribute][taught].format(subject),
        "answer": _ANSWERS[taught].format(value),
        "paraphrased_question": FORMS[attribute][other].format(subject),
        "paraphrased_answer": _ANSWERS[other].format(value),
        "perturbed_answer": [_ANSWERS[other].format(word) for word in wrong],
    }
