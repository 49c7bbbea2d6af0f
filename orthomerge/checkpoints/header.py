"""Read and write the header of a safetensors file; nothing here touches tensor data.

The format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes. A header is
believed only after every check below, because files come from strangers.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthomerge.checkpoints.dtypes import ITEM_SIZES
from orthomerge.errors import HeaderError

__all__ = ["Header", "TensorInfo", "encode_header", "read_header"]

_MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit
_ALIGNMENT = 8
_MAX_BYTES = 2**63 - 1  # of one tensor: what torch can count
_MAX_QUOTED = 80  # characters of a wrong value that a message repeats
_REFETCH = "The file is damaged or was not written by safetensors: fetch or save it again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor. ``begin``/``end`` are absolute byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in file order and the free-form metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    nbytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``.

    Raises:
        HeaderError: The file is truncated, the JSON is invalid or has duplicate keys, a dtype is
            unknown, or the tensors do not fill the file exactly, without gap or overlap.
    """
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # opening one waits for a writer
            raise HeaderError("not a regular file", file=path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise HeaderError(
                    "not a complete safetensors file",
                    file=path,
                    expected=f"a header of at most {max(size - 8, 0)} bytes",
                    found=f"a length field of {length}" if size >= 8 else f"{size} bytes in all",
                    remedy=_REFETCH,
                )
            raw = file.read(length)
    except OSError as error:
        raise HeaderError(f"cannot be read: {error.strerror}", file=path) from error
    entries = _parse_json(path, raw)
    metadata = _check_metadata(path, entries.pop("__metadata__", {}))
    start = 8 + length
    tensors = [_check_entry(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    _check_layout(path, tensors, start, size)
    return Header({info.name: info for info in tensors}, metadata, start)


def encode_header(
    tensors: Iterable[TensorInfo], metadata: Mapping[str, str], length: int | None = None
) -> bytes:
    """Return the header bytes for tensors laid out one after another, length field included.

    Args:
        tensors: In file order; their offsets are ignored and derived from their sizes.
        metadata: String to string, stored under ``__metadata__``.
        length: Total size to pad to with spaces; None pads to a multiple of eight bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in tensors:
        entries[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    total = length if length is not None else -(-(8 + len(body)) // _ALIGNMENT) * _ALIGNMENT
    if total < 8 + len(body):
        raise ValueError(f"a header of {8 + len(body)} bytes does not fit into {total}")
    return (total - 8).to_bytes(8, "little") + body.ljust(total - 8)


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise HeaderError(
                    "the header names this key twice", file=path, tensor=key, remedy=_REFETCH
                )
            seen[key] = value
        return seen

    if not raw.startswith(b"{"):
        raise HeaderError("the header does not start with '{'", file=path, remedy=_REFETCH)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
        _check_unicode(entries)
    except (ValueError, RecursionError) as error:
        raise HeaderError(
            f"the header is not valid JSON: {error}", file=path, remedy=_REFETCH
        ) from error
    assert isinstance(entries, dict)  # it starts with '{' and parsed
    return entries


def _check_unicode(entries: Mapping[str, Any]) -> None:
    """Refuse lone surrogates: JSON can escape them, but no file name or UTF-8 text can hold them.

    Raises:
        UnicodeEncodeError: A name or a metadata text holds one.
    """
    metadata = entries.get("__metadata__")
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else []
    for text in [*entries, *texts]:
        if isinstance(text, str):
            text.encode()


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
        return metadata
    raise HeaderError(
        "must map strings to strings", file=path, tensor="__metadata__", remedy=_REFETCH
    )


def _check_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    def wrong(problem: str, **facts: object) -> HeaderError:
        return HeaderError(
            problem,
            file=path,
            tensor=name,
            remedy=_REFETCH,
            expected=facts.get("expected"),
            found=_quoted(facts["found"]) if "found" in facts else None,
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("the header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise wrong("unknown dtype", expected=", ".join(ITEM_SIZES), found=dtype)
    if not _is_sizes(shape):
        raise wrong("the shape must be a list of non-negative integers", found=shape)
    if not _is_countable(shape, ITEM_SIZES[dtype]):
        raise wrong("the shape is too large", found=shape)
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise wrong("data_offsets must be two non-negative integers", found=offsets)
    info = TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])
    if info.end - info.begin != info.nbytes:
        raise wrong(
            f"shape {_quoted(shape)} of {dtype} does not match its data_offsets",
            expected=f"{info.nbytes} bytes",
            found=f"{info.end - info.begin} bytes",
        )
    return info


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_countable(shape: list[int], item_size: int) -> bool:
    """Return whether a tensor's strides fit 64 bits, also where another dimension is 0."""
    total = item_size
    for size in shape:
        total *= max(size, 1)
        if total > _MAX_BYTES:
            return False
    return True


def _quoted(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "…"


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    position = start
    for info in tensors:
        if info.begin != position:
            kind = "a gap before" if info.begin > position else "an overlap at"
            raise HeaderError(
                f"{kind} this tensor",
                file=path,
                tensor=info.name,
                expected=f"offset {position}",
                found=f"offset {info.begin}",
                remedy=_REFETCH,
            )
        position = info.end
    if position != size:
        kind = "the file is truncated" if size < position else "bytes follow the last tensor"
        raise HeaderError(
            kind, file=path, expected=f"{position} bytes", found=f"{size} bytes", remedy=_REFETCH
        )
