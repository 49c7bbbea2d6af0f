"""The safetensors header: byte-exact against the reference library, and closed to hostile files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import _TYPES, load_file, save_file

from orthomerge.checkpoints.dtypes import ITEM_SIZES, torch_dtype
from orthomerge.checkpoints.header import TensorInfo, encode_header, read_header
from orthomerge.checkpoints.reader import FileCheckpoint
from orthomerge.errors import HeaderError

GOLDEN = Path(__file__).parent.parent / "golden" / "by_safetensors.safetensors"


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(begin: Any, end: Any, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def described(entries: Mapping[str, Any], data: bytes = bytes(4)) -> bytes:
    return raw_file(json.dumps(entries).encode(), data)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def samples() -> dict[str, torch.Tensor]:
    raw = torch.arange(1, 49, dtype=torch.uint8) % 2  # bits that every dtype, bool too, can hold
    found = {name: raw.view(torch_dtype(name)).reshape(2, -1) for name in ITEM_SIZES}
    return found | {"scalar": torch.tensor(1.5), "empty": torch.empty(3, 0), "größe/名": raw}


def test_golden_file_is_read_exactly() -> None:
    header = read_header(GOLDEN)
    assert header.metadata == {"format": "pt", "note": "größer"}
    assert list(header.tensors) == ["c.scale", "a.weight", "b.weight", "d.empty", "e.mask"]
    assert header.nbytes == 0x170
    assert header.tensors["b.weight"] == TensorInfo("b.weight", "BF16", (2, 1), 0x190, 0x194)
    checkpoint = FileCheckpoint("golden", {GOLDEN: header})
    for name, expected in load_file(GOLDEN).items():
        tensor = checkpoint.read(name)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    assert checkpoint.read("a.weight").tolist() == [[0.0, 0.25, 0.5], [0.75, 1.0, 1.25]]
    checkpoint.close()


def test_encoded_header_has_the_expected_bytes() -> None:
    tensors = [
        TensorInfo("ä", "F64", (1, 2)),
        TensorInfo("b", "BOOL", ()),
        TensorInfo("c", "U8", (0,)),
    ]
    body = (
        '{"__metadata__":{"format":"pt"},'
        '"ä":{"dtype":"F64","shape":[1,2],"data_offsets":[0,16]},'
        '"b":{"dtype":"BOOL","shape":[],"data_offsets":[16,17]},'
        '"c":{"dtype":"U8","shape":[0],"data_offsets":[17,17]}}'
    ).encode()
    padding = -(8 + len(body)) % 8
    expected = (len(body) + padding).to_bytes(8, "little") + body + b" " * padding
    assert encode_header(tensors, {"format": "pt"}) == expected
    assert encode_header([], {}) == b"\x08" + bytes(7) + b"{}      "


def test_encoded_header_is_padded_to_the_length_asked_for() -> None:
    short = encode_header([TensorInfo("a", "F32", (1,))], {})
    long = encode_header([TensorInfo("a", "F32", (1,))], {}, length=len(short) + 24)
    assert len(long) == len(short) + 24
    assert long[8:].rstrip() == short[8:].rstrip()
    with pytest.raises(ValueError, match="does not fit"):
        encode_header([TensorInfo("a", "F32", (1,))], {"k": "v" * 50}, length=len(short))


def test_golden_header_reencodes_to_the_same_bytes() -> None:
    header = read_header(GOLDEN)
    encoded = encode_header(header.tensors.values(), header.metadata)
    assert encoded == GOLDEN.read_bytes()[: header.nbytes]


def test_every_dtype_of_the_reference_library_is_known() -> None:
    assert {name: torch_dtype(name) for name in ITEM_SIZES} == _TYPES
    for name, size in ITEM_SIZES.items():
        assert torch_dtype(name).itemsize == size


def test_files_of_the_reference_library_are_read_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file(samples(), path, {"k": "v"})
    header = read_header(path)
    checkpoint = FileCheckpoint("theirs", {path: header})
    assert header.metadata == {"k": "v"}
    assert set(header.tensors) == set(samples())
    for name, expected in samples().items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert as_bytes(found) == as_bytes(expected)
    checkpoint.close()


def test_reference_library_reads_our_files_bit_for_bit(tmp_path: Path) -> None:
    infos = {
        name: TensorInfo(name, next(k for k, v in _TYPES.items() if v == t.dtype), tuple(t.shape))
        for name, t in samples().items()
    }
    path = tmp_path / "ours.safetensors"
    header = encode_header(infos.values(), {"format": "pt", "k": "ß"})
    path.write_bytes(header + b"".join(as_bytes(tensor) for tensor in samples().values()))
    loaded = load_file(path)
    assert set(loaded) == set(samples())
    for name, expected in samples().items():
        assert (loaded[name].dtype, loaded[name].shape) == (expected.dtype, expected.shape)
        assert as_bytes(loaded[name]) == as_bytes(expected)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "k": "ß"}


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
    "lone_surrogate": (described({"\ud800": entry(0, 4)}), ("Unicode",)),
    "surrogate_metadata": (described({"__metadata__": {"k": "\udfff"}}, b""), ("Unicode",)),
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
    with pytest.raises(HeaderError, match="no.safetensors: cannot be read: No such file"):
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
    except HeaderError as error:
        assert error.file == str(path)
        return
    position = header.nbytes
    for info in header.tensors.values():
        assert info.begin == position
        assert info.end - info.begin == info.nbytes
        position = info.end
    assert position == size
