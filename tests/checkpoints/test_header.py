"""The safetensors header: byte-exact against the reference library; hostile ones are elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import _TYPES, load_file, save_file

from orthomerge.checkpoints.dtypes import ITEM_SIZES, safetensors_dtype, torch_dtype
from orthomerge.checkpoints.header import TensorInfo, encode_header, read_header
from orthomerge.checkpoints.reader import FileCheckpoint

GOLDEN = Path(__file__).parent.parent / "golden" / "by_safetensors.safetensors"


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def samples() -> dict[str, torch.Tensor]:
    raw = torch.arange(1, 49, dtype=torch.uint8) % 2  # bits that every dtype, bool too, can hold
    found = {name: raw.clone().view(dtype).reshape(2, -1) for name, dtype in _TYPES.items()}
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
    for name, dtype in _TYPES.items():
        assert torch_dtype(name) == dtype
        assert safetensors_dtype(dtype) == name
        assert ITEM_SIZES[name] == dtype.itemsize


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
        name: TensorInfo(name, safetensors_dtype(t.dtype), tuple(t.shape))
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
