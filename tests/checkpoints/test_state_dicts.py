"""State dicts in memory and in pickle files, seen as checkpoints."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from orthomerge.checkpoints.digest import hash_checkpoint
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.checkpoints.state_dict import StateDictCheckpoint
from orthomerge.errors import CheckpointError, ShardIndexError

StateDict = dict[str, torch.Tensor]


def read_bytes(checkpoint: Any, name: str, step: int = 1 << 20) -> bytes:
    """Read a tensor in pieces of ``step`` bytes."""
    size = checkpoint.tensors[name].nbytes
    found = bytearray(size)
    for start in range(0, size, step):
        checkpoint.read_into(name, memoryview(found)[start : start + step], start)
    return bytes(found)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_state_dict_opens_with_all_its_tensors(state_dict: StateDict) -> None:
    checkpoint = open_checkpoint(state_dict)
    assert isinstance(checkpoint, StateDictCheckpoint)
    assert (checkpoint.origin, checkpoint.folder, checkpoint.files) == ("state dict", None, ())
    for name, tensor in state_dict.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert torch.equal(checkpoint.read(name), tensor)
        for step in (1 << 20, 24, 3):
            assert read_bytes(checkpoint, name, step) == as_bytes(tensor)


def test_empty_and_scalar_tensors_are_read() -> None:
    checkpoint = open_checkpoint({"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)})
    checkpoint.read_into("empty", memoryview(bytearray()))
    assert read_bytes(checkpoint, "scalar") == as_bytes(torch.tensor(2.0))


def test_noncontiguous_tensors_are_read_in_logical_order() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"t": whole.t(), "column": whole[:, 2], "step": whole[::2, ::3], "wide": whole[:1]}
    views["expanded"] = torch.ones(1).expand(5)
    checkpoint = open_checkpoint(views)
    for name, view in views.items():
        assert read_bytes(checkpoint, name, 8) == as_bytes(view)


def test_lazy_conjugates_are_read_as_their_values() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    checkpoint = open_checkpoint({"c": tensor.conj(), "n": tensor.conj().imag})
    assert read_bytes(checkpoint, "c") == as_bytes(tensor.conj().resolve_conj())
    assert read_bytes(checkpoint, "n") == as_bytes(torch.tensor([-2.0, 4.0]))


def test_tied_tensors_are_read_under_both_names() -> None:
    embedding = torch.randn(4, 2)
    checkpoint = open_checkpoint({"embed": embedding, "head": embedding, "part": embedding[:2]})
    assert read_bytes(checkpoint, "embed") == read_bytes(checkpoint, "head")
    assert read_bytes(checkpoint, "part") == as_bytes(embedding[:2])


def test_parameters_are_detached() -> None:
    checkpoint = open_checkpoint({"w": torch.nn.Parameter(torch.ones(2))})
    assert not checkpoint.read("w").requires_grad


BAD: dict[str, Any] = {
    "sparse": torch.eye(2).to_sparse(),
    "meta": torch.empty(2, device="meta"),
    "complex128": torch.zeros(2, dtype=torch.complex128),
    "list": [1.0],
    "number": 3,
    "nested": {"weight": torch.ones(1)},
}


@pytest.mark.parametrize("name", BAD)
def test_value_without_dense_data_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint({"good": torch.ones(1), name: BAD[name]})
    assert caught.value.tensor == name
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", [1, "__metadata__", "\ud800"])
def test_name_that_no_file_can_hold_is_refused(name: Any) -> None:
    with pytest.raises(CheckpointError, match="is not a tensor name"):
        open_checkpoint({name: torch.ones(1)})


def test_fingerprint_follows_the_values_in_memory(state_dict: StateDict) -> None:
    before = open_checkpoint(state_dict).fingerprint()
    assert open_checkpoint(dict(state_dict)).fingerprint() == before
    state_dict["model.norm.weight"][0] += 1
    assert open_checkpoint(state_dict).fingerprint() != before


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_state_dict_opens(
    wrapper: str | None, zipped: bool, tmp_path: Path, state_dict: StateDict
) -> None:
    content = {wrapper: state_dict} if wrapper else state_dict
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for source in (path, tmp_path):
        checkpoint = open_checkpoint(source)
        assert checkpoint.files == (path,)
        assert hash_checkpoint(checkpoint) == hash_checkpoint(open_checkpoint(state_dict))


class Payload:
    """Unpickling it would create a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(suffix: str, writer: str, tmp_path: Path) -> None:
    target, path = tmp_path / "owned", tmp_path / f"model{suffix}"
    content = {"w": torch.ones(1), "x": Payload(target)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(CheckpointError, match="holds more than tensors, and is not loaded"):
        open_checkpoint(path)
    assert not target.exists()
    if writer == "torch":
        torch.load(path, weights_only=False)
        assert target.exists(), "the payload is a live one"


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickle_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(
        {"w": torch.ones(3), "b": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped
    )
    good, choose = path.read_bytes(), random.Random(0)
    for _ in range(150):
        content = bytearray(good)
        for _ in range(3):
            content[choose.randrange(min(len(content), 500))] = choose.randrange(256)
        path.write_bytes(content[: choose.choice([len(content), choose.randrange(len(content))])])
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            refused = error
    assert refused.file == str(path)


def test_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        open_checkpoint(tmp_path / "model.pt")


def test_incomplete_pickle_shards_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ShardIndexError, match="1 of 2 shards"):
        open_checkpoint(tmp_path)
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_tensor_in_two_pickle_shards_is_refused(tmp_path: Path) -> None:
    for part in (1, 2):
        torch.save({"a": torch.ones(part)}, tmp_path / f"pytorch_model-0000{part}-of-00002.bin")
    with pytest.raises(ShardIndexError, match="is in two shards"):
        open_checkpoint(tmp_path)


def test_pickle_modified_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(1)}, path)
    checkpoint = open_checkpoint(path)
    checkpoint.check_unchanged()
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match="was modified"):
        checkpoint.check_unchanged()
