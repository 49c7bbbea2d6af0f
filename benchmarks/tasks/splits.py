"""The tasks, and the choice of their training, validation and test examples.

The choice is the same in every run: it is drawn once, with the task's name as seed.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks import corpora
from tasks.corpora import Text

__all__ = ["DEFAULT_TASKS", "SIZES", "TASKS", "Examples", "Split", "Task", "load", "split"]

#: Texts per split; every label gets the same number (rounded down).
SIZES = {"test": 400, "validation": 200, "train": 1200}


@dataclass(frozen=True)
class Task:
    """One classification task.

    Args:
        prompts: One description per label, whose frozen base embeddings are the classifier.
        read: Yields all labelled texts, from the cache.
    """

    prompts: tuple[str, ...]
    read: Callable[[Path], Iterable[Text]]


@dataclass(frozen=True)
class Split:
    """Texts with their labels."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def first(self, count: int) -> Split:
        """Return the first ``count`` examples; the labels take turns, so they are balanced."""
        return Split(self.texts[:count], self.labels[:count])


Examples = dict[str, Split]


def _valence(file: str) -> Callable[[Path], Iterator[Text]]:
    return lambda cache: corpora.valence(cache, file)


#: The tasks, in the order in which duplicates are given away: first come, first served.
TASKS: dict[str, Task] = {
    "movie": Task(
        ("a negative movie review", "a positive movie review"), _valence("movieReviewSnippets")
    ),
    "spam": Task(("a normal email message", "a spam advertisement email"), corpora.mails),
    "subj": Task(
        ("a description of the plot of a movie", "a critic's opinion about a movie"),
        corpora.plots_and_reviews,
    ),
    "genre": Task(
        (
            "a newspaper report",
            "a religious text",
            "an article about a hobby or craft",
            "a scientific or academic text",
            "a passage from a romance novel",
        ),
        corpora.brown_genres,
    ),
    "tweet": Task(("a tweet with negative feelings", "a tweet with positive feelings"),
                  _valence("tweets")),
    "product": Task(
        ("a complaint about a product", "praise of a product"), _valence("amazonReviewSnippets")
    ),
    "party": Task(
        ("a speech by a Democrat", "a speech by a Republican"), corpora.parties
    ),
}  # fmt: skip

#: What is merged unless asked otherwise. Party is left out: with speakers kept apart, 60 steps do
#: not lift its experts above the base, so that nothing can be said about merging them.
DEFAULT_TASKS = tuple(name for name in TASKS if name != "party")


def load(cache: Path) -> dict[str, Examples]:
    """Return every task's splits, read from the archives once and then from the cache."""
    sources = [Path(__file__), Path(corpora.__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    kept = cache / f"examples-{digest[:16]}.json"
    if not kept.exists():
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(_read(cache)))
        partial.replace(kept)
    return {
        task: {name: Split(tuple(rows[0]), tuple(rows[1])) for name, rows in splits.items()}
        for task, splits in json.loads(kept.read_text()).items()
    }


def _read(cache: Path) -> dict[str, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """Return every task's splits; no text occurs twice, also not in two tasks."""
    seen: set[str] = set()
    found = {}
    for name, task in TASKS.items():
        fresh = []
        for text in task.read(cache):
            key = re.sub(r"\W+", " ", text.text.lower()).strip()[:160]
            if key and key not in seen:
                seen.add(key)
                fresh.append(text)
        splits = split(fresh, len(task.prompts), name)
        found[name] = {part: (rows.texts, rows.labels) for part, rows in splits.items()}
    return found


def split(texts: list[Text], labels: int, name: str) -> Examples:
    """Draw disjoint, balanced splits; texts of one group stay in one split.

    Args:
        texts: All texts of one task.
        labels: Number of labels.
        name: The task's name, which seeds the draw.

    Raises:
        ValueError: There are too few texts of a label for the test and validation splits.
    """
    draw = random.Random(f"splits of {name}")
    chosen: dict[str, list[list[Text]]] = {name: [] for name in SIZES}
    taken: dict[str, str] = {}
    for label in range(labels):
        own = [text for text in texts if text.label == label]
        for name_of_split, parts in _fill(own, labels, taken, draw).items():
            chosen[name_of_split].append(parts)
    examples = {}
    for name_of_split, parts in chosen.items():
        count = min(len(part) for part in parts)
        rows = [part[i] for i in range(count) for part in parts]
        if name_of_split != "train" and len(rows) < SIZES[name_of_split] // labels * labels:
            raise ValueError(f"{name}: too few texts for the {name_of_split} split")
        examples[name_of_split] = Split(
            tuple(row.text for row in rows), tuple(row.label for row in rows)
        )
    return examples


def _fill(
    own: list[Text], labels: int, taken: dict[str, str], draw: random.Random
) -> dict[str, list[Text]]:
    """Give whole groups of one label to the splits in turn until each has enough."""
    groups: dict[str, list[Text]] = {}
    for text in own:
        groups.setdefault(text.group, []).append(text)
    order = sorted(groups)
    draw.shuffle(order)
    filled: dict[str, list[Text]] = {name: [] for name in SIZES}
    for group in order:
        wanting = [n for n in SIZES if len(filled[n]) < SIZES[n] // labels]
        if group not in taken and not wanting:
            continue
        # A group with texts of several labels stays where its first label put it.
        place = taken.setdefault(group, max(wanting, key=lambda n: _lack(filled, n, labels))
                                 if wanting else "train")  # fmt: skip
        filled[place] += groups[group]
    for name, parts in filled.items():
        draw.shuffle(parts)
        filled[name] = parts[: SIZES[name] // labels]
    return filled


def _lack(filled: dict[str, list[Text]], name: str, labels: int) -> float:
    return 1 - len(filled[name]) * labels / SIZES[name]
