"""Decide where every output byte goes before any is computed: shards, headers, offsets, index.

Pure arithmetic on tensor names, shapes and dtypes; no file is opened here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orthomerge.checkpoints.dtypes import ITEM_SIZES
from orthomerge.checkpoints.header import TensorInfo, encode_header

__all__ = ["INDEX_NAME", "Layout", "Place", "Shard", "plan_layout"]

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies: its shard's file name and absolute byte offset."""

    shard: str
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: tensors in file order, the encoded header, the total size."""

    filename: str
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(info.nbytes for info in self.tensors)


@dataclass(frozen=True, slots=True)
class Layout:
    """All shards of an output and the place of every tensor."""

    shards: tuple[Shard, ...]
    places: Mapping[str, Place]

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(shard.nbytes for shard in self.shards)

    def index_json(self) -> str | None:
        """Return the shard index's text, or None for a single file."""
        if len(self.shards) == 1:
            return None
        total = sum(info.nbytes for shard in self.shards for info in shard.tensors)
        weight_map = {name: place.shard for name, place in sorted(self.places.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(index, indent=2) + "\n"


def plan_layout(
    tensors: Iterable[TensorInfo],
    *,
    max_shard_bytes: int,
    filename: str = "model.safetensors",
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """Lay tensors out in shards of at most ``max_shard_bytes`` (a larger tensor gets its own).

    Within a shard, tensors are ordered by item size, widest first, so that each is aligned.

    Args:
        tensors: Output tensors, in the order they should be grouped into shards.
        max_shard_bytes: Upper limit of the data in one file.
        filename: Name of the file when one suffices; the stem of the shards' names otherwise.
        metadata: ``__metadata__`` of every file.
    """
    groups: list[list[TensorInfo]] = [[]]
    used = 0
    for info in tensors:
        if groups[-1] and used + info.nbytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(info)
        used += info.nbytes
    names = _shard_names(filename, len(groups))
    meta = dict(metadata or {"format": "pt"})
    shards = tuple(_shard(name, group, meta) for name, group in zip(names, groups, strict=True))
    return Layout(shards, _places(shards))


def _shard_names(filename: str, count: int) -> list[str]:
    if count == 1:
        return [filename]
    stem = filename.removesuffix(".safetensors")
    return [f"{stem}-{part:05d}-of-{count:05d}.safetensors" for part in range(1, count + 1)]


def _shard(filename: str, group: Sequence[TensorInfo], metadata: Mapping[str, str]) -> Shard:
    ordered = tuple(sorted(group, key=lambda info: -ITEM_SIZES[info.dtype]))
    return Shard(filename, ordered, metadata, encode_header(ordered, metadata))


def _places(shards: Iterable[Shard]) -> dict[str, Place]:
    places = {}
    for shard in shards:
        offset = len(shard.header)
        for info in shard.tensors:
            places[info.name] = Place(shard.filename, offset)
            offset += info.nbytes
    return places
