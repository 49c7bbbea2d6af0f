"""The digest of a tokenised set, for provenance and for refusing to resume on other data."""

from __future__ import annotations

import struct
import sys
from array import array

from blake3 import blake3

from orthomerge.unlearning.data.tokenised import TokenisedSet

__all__ = ["fingerprint"]


def fingerprint(set_: TokenisedSet) -> str:
    """Return the BLAKE3 digest of what a set trains on.

    For each example: its length, ids, labels (64 bit, little endian) and weight. Names, files and
    columns that were not read do not count: two files with the same rows are the same data.

    Returns:
        ``"blake3:<hex>"``.
    """
    total = blake3()
    for row, example in zip(set_.rows, set_.examples, strict=True):
        total.update(struct.pack("<qd", len(example.ids), row.weight))
        for numbers in (example.ids, example.labels):
            total.update(_little_endian(numbers))
    return f"blake3:{total.hexdigest()}"


def _little_endian(numbers: list[int]) -> bytes:
    values = array("q", numbers)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
