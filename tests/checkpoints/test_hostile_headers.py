"""Hostile safetensors headers: each is refused by name, none leads outside its file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.checkpoints.header import read_header
from orthomerge.errors import HeaderError

GOLDEN = Path(__file__).parent.parent / "golden" / "by_safetensors.safetensors"


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(begin: Any, end: Any, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def described(entries: Mapping[str, Any], data: bytes = bytes(4)) -> bytes:
    return raw_file(json.dumps(entries).encode(), data)


TWO = {"a": entry(0, 4), "b": entry(4, 8)}
DUPLICATE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32",'
DUPLICATE += b'"shape":[1],"data_offsets":[0,4]}}'
INSIDE = b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'

# Name -> (file content, words the message must hold beside the file's name).
HOSTILE: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty_file": (b"", ("not a complete", "0 bytes")),
    "seven_bytes": (bytes(7), ("not a complete", "7 bytes")),
    "length_zero": (raw_file(b""), ("does not start with",)),
    "length_beyond_file": (raw_file(b"{}", length=3), ("length field of 3",)),
    "length_huge": (raw_file(b"{}", length=2**64 - 1), (str(2**64 - 1),)),
    "length_over_the_limit": (raw_file(b"{}", length=100_000_001), ("100000001",)),
    "not_json": (raw_file(b"{nonsense"), ("not valid JSON",)),
    "not_utf8": (raw_file(b'{"\xff":1}'), ("not valid JSON",)),
    "json_array": (raw_file(b"[1]"), ("does not start with",)),
    "leading_space": (raw_file(b" {}"), ("does not start with",)),
    "trailing_json": (raw_file(b"{}{}"), ("not valid JSON",)),
    "deeply_nested": (raw_file(b'{"a":' + b"[" * 200_000), ("not valid JSON",)),
    "number_of_many_digits": (raw_file(b'{"a":' + b"9" * 10_000 + b"}"), ("not valid JSON",)),
    "duplicate_tensor": (raw_file(DUPLICATE, bytes(4)), ("'a'", "twice")),
    "duplicate_field": (raw_file(INSIDE, bytes(4)), ("'dtype'", "twice")),
    "lone_surrogate": (described({"\ud800": entry(0, 4)}), ("surrogates not allowed",)),
    "surrogate_metadata": (
        described({"__metadata__": {"k": "\udfff"}}, b""),
        ("surrogates not allowed",),
    ),
    "gap": (described({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), ("'b'", "a gap before")),
    "gap_at_start": (described({"a": entry(4, 8)}, bytes(8)), ("'a'", "a gap before")),
    "overlap": (described({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), ("'b'", "an overlap")),
    "same_place": (described({"a": entry(0, 4), "b": entry(0, 4)}), ("'b'", "an overlap")),
    "truncated": (described(TWO, bytes(7)), ("truncated", "bytes")),
    "trailing_bytes": (described(TWO, bytes(9)), ("bytes follow the last tensor",)),
    "negative_offset": (described({"a": entry(-4, 0)}), ("'a'", "data_offsets", "-4")),
    "reversed_offsets": (described({"a": entry(4, 0)}), ("'a'", "does not match")),
    "float_offset": (described({"a": entry(0, 4.0)}), ("'a'", "data_offsets", "4.0")),
    "bool_offset": (described({"a": entry(False, 4)}), ("'a'", "data_offsets", "False")),
    "text_offset": (described({"a": entry("0", 4)}), ("'a'", "data_offsets")),
    "nan_offset": (described({"a": entry(float("nan"), 4)}), ("'a'", "data_offsets")),
    "huge_offset": (described({"a": entry(2**64, 2**64 + 4)}), ("'a'", "a gap before")),
    "three_offsets": (
        described({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}),
        ("'a'", "two non-negative"),
    ),
    "shape_mismatch": (described({"a": entry(0, 4, shape=(2,))}), ("'a'", "8 bytes", "4 bytes")),
    "dtype_mismatch": (described({"a": entry(0, 4, "F64")}), ("'a'", "F64", "8 bytes")),
    "negative_shape": (described({"a": entry(0, 4, shape=(-1, -1))}), ("'a'", "shape")),
    "bool_shape": (described({"a": entry(0, 4, shape=(True,))}), ("'a'", "shape")),
    "huge_shape": (described({"a": entry(0, 0, shape=(0, 2**63))}, b""), ("'a'", "too large")),
    "huge_product": (
        described({"a": entry(0, 0, shape=(2**40, 2**40, 0))}, b""),
        ("'a'", "too large"),
    ),
    "long_shape": (described({"a": entry(0, 4, shape=[1] * 5000 + [-1])}), ("'a'", "shape", "…")),
    "long_mismatch": (described({"a": entry(0, 4, shape=[1] * 5000 + [2])}), ("'a'", "…")),
    "long_dtype": (described({"a": entry(0, 4, "F" * 5000)}), ("'a'", "unknown dtype", "…")),
    "shape_no_list": (described({"a": {**entry(0, 4), "shape": 1}}), ("'a'", "shape")),
    "unknown_dtype": (described({"a": entry(0, 4, "F31")}), ("'a'", "unknown dtype", "F31")),
    "dtype_no_text": (described({"a": entry(0, 4, ["F32"])}), ("'a'", "unknown dtype")),
    "entry_no_object": (described({"a": 1}), ("'a'", "exactly dtype, shape")),
    "missing_field": (described({"a": {"dtype": "F32"}}), ("'a'", "exactly dtype, shape")),
    "extra_field": (described({"a": {**entry(0, 4), "x": 1}}), ("'a'", "exactly dtype, shape")),
    "metadata_number": (described({"__metadata__": {"a": 1}}, b""), ("__metadata__", "strings")),
    "metadata_list": (described({"__metadata__": []}, b""), ("__metadata__", "strings")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, words = HOSTILE[case]
    path = tmp_path / f"{case}.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert caught.value.file == str(path)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text) < 1000, "a message is not the place for the file's content"


def test_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"no\.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "no.safetensors")


def test_unreadable_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # file modes do not stop root
    with pytest.raises(HeaderError, match="Permission denied"):
        read_header(GOLDEN)


def test_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(HeaderError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Path]:
    path = tmp_path_factory.mktemp("corrupt") / "file.safetensors"

    def write(content: bytes) -> Path:
        path.write_bytes(content)
        return path

    return write


@settings(max_examples=400)
@given(
    edits=st.lists(st.tuples(st.integers(0, 0x180), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_corrupted_header_is_refused_or_stays_inside_the_file(
    scratch: Callable[[bytes], Path], edits: list[tuple[int, int]]
) -> None:
    content = bytearray(GOLDEN.read_bytes())
    for position, value in edits:
        content[position] = value
    check_safe(scratch(bytes(content)), len(content))


@settings(max_examples=200)
@given(st.binary(max_size=40), st.integers(0, 0x199), st.integers(0, 40))
def test_spliced_file_is_refused_or_stays_inside_the_file(
    scratch: Callable[[bytes], Path], inserted: bytes, position: int, removed: int
) -> None:
    golden = GOLDEN.read_bytes()
    content = golden[:position] + inserted + golden[position + removed :]
    check_safe(scratch(content), len(content))


def check_safe(path: Path, size: int) -> None:
    try:
        header = read_header(path)
    except HeaderError:
        return
    position = header.nbytes
    for info in header.tensors.values():
        assert info.begin == position
        assert info.end - info.begin == info.nbytes
        position = info.end
    assert position == size
