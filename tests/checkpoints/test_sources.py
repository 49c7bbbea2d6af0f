"""What a path, folder or hub name opens as, and what is refused with which advice."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orthomerge.checkpoints.reader import FileCheckpoint
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.errors import CheckpointError, HeaderError, ShardIndexError

StateDict = dict[str, torch.Tensor]
Writer = Callable[..., Path]


def assert_holds(checkpoint: object, expected: StateDict) -> None:
    assert isinstance(checkpoint, FileCheckpoint)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
    checkpoint.close()


def test_single_file_opens(write_file: Writer, state_dict: StateDict) -> None:
    path = write_file("a.safetensors", state_dict)
    checkpoint = open_checkpoint(path)
    assert checkpoint.origin == str(path)
    assert checkpoint.files == (path,)
    assert checkpoint.folder == path.parent
    assert checkpoint.metadata == {"format": "pt"}
    assert_holds(checkpoint, state_dict)


def test_index_file_opens_its_shards(write_folder: Writer, state_dict: StateDict) -> None:
    folder = write_folder("m", state_dict, shards=3)
    checkpoint = open_checkpoint(str(folder / "model.safetensors.index.json"))
    assert len(checkpoint.files) == 3
    assert checkpoint.folder == folder
    assert_holds(checkpoint, state_dict)


def test_folder_with_index_opens_its_shards(write_folder: Writer, state_dict: StateDict) -> None:
    folder = write_folder("m", state_dict, shards=2)
    assert_holds(open_checkpoint(folder), state_dict)


@pytest.mark.parametrize("filename", ["model.safetensors", "any.safetensors"])
def test_folder_with_one_file_opens(
    filename: str, write_file: Writer, state_dict: StateDict
) -> None:
    folder = write_file(f"m/{filename}", state_dict).parent
    assert_holds(open_checkpoint(folder), state_dict)


def test_usual_file_name_wins_over_others(write_file: Writer, state_dict: StateDict) -> None:
    write_file("m/consolidated.safetensors", {"other": torch.ones(1)})
    folder = write_file("m/model.safetensors", state_dict).parent
    assert_holds(open_checkpoint(folder), state_dict)


def test_index_wins_over_files_it_does_not_name(
    write_folder: Writer, write_file: Writer, state_dict: StateDict
) -> None:
    folder = write_folder("m", state_dict, shards=2)
    write_file("m/consolidated.safetensors", {"other": torch.ones(1)})
    assert_holds(open_checkpoint(folder), state_dict)


def test_model_file_beside_an_index_without_it_is_ambiguous(
    write_folder: Writer, write_file: Writer, state_dict: StateDict
) -> None:
    folder = write_folder("m", state_dict, shards=2)
    write_file("m/model.safetensors", {"other": torch.ones(1)})
    with pytest.raises(ShardIndexError, match=r"model\.safetensors.*Name the one"):
        open_checkpoint(folder)


def test_two_indexes_are_ambiguous(write_folder: Writer, state_dict: StateDict) -> None:
    folder = write_folder("m", state_dict, shards=2)
    text = (folder / "model.safetensors.index.json").read_text()
    (folder / "other.safetensors.index.json").write_text(text)
    with pytest.raises(ShardIndexError, match="several shard indexes"):
        open_checkpoint(folder)


def test_complete_shards_without_index_open(write_folder: Writer, state_dict: StateDict) -> None:
    folder = write_folder("m", state_dict, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    assert_holds(open_checkpoint(folder), state_dict)


@pytest.mark.parametrize("renamed", [None, "model-00003-of-00002.safetensors"])
def test_incomplete_shards_without_index_are_refused(
    renamed: str | None, write_folder: Writer, state_dict: StateDict
) -> None:
    folder = write_folder("m", state_dict, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    shard = folder / "model-00002-of-00002.safetensors"
    if renamed:
        shard.rename(folder / renamed)
    else:
        shard.rename(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(ShardIndexError, match="without an index: model-00001-of-00002"):
        open_checkpoint(folder)


def test_lone_shard_of_several_is_refused(write_folder: Writer, state_dict: StateDict) -> None:
    folder = write_folder("m", state_dict, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ShardIndexError, match="1 of 2 shards"):
        open_checkpoint(folder)


def test_unrelated_files_without_index_are_refused(write_file: Writer) -> None:
    write_file("m/a.safetensors", {"a": torch.ones(1)})
    folder = write_file("m/b.safetensors", {"b": torch.ones(1)}).parent
    with pytest.raises(ShardIndexError, match=r"a\.safetensors, b\.safetensors"):
        open_checkpoint(folder)


def test_tensor_in_two_unindexed_shards_is_refused(
    write_folder: Writer, write_file: Writer, state_dict: StateDict
) -> None:
    folder = write_folder("m", state_dict, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    write_file("m/model-00002-of-00002.safetensors", state_dict)
    with pytest.raises(ShardIndexError, match="is in two shards, model-00001"):
        open_checkpoint(folder)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no model weights") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(tmp_path)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(HeaderError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def test_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder\. Check the path"):
        open_checkpoint(tmp_path / "nothing")


def test_path_that_looks_like_a_hub_name_gets_the_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="For a model on the Hub write hf:") as caught:
        open_checkpoint("meta-llama/Llama-3.2-1B")
    assert "hf:meta-llama/Llama-3.2-1B" in str(caught.value)


def test_unknown_file_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"files of type '\.gguf'"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_impossible_path_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(name)


def test_path_behind_a_closed_door_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)  # file modes do not stop root
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint("secret/model.safetensors")


def test_local_path_never_touches_the_network(
    write_folder: Writer, state_dict: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    folder = write_folder("m", state_dict, shards=2)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.chdir(folder.parent)
    assert_holds(open_checkpoint("m"), state_dict)
    with pytest.raises(CheckpointError):
        open_checkpoint("org/name")


@pytest.mark.parametrize("name", ["hf:org/no-such-model", "hf:org/name@v1", "hf:", "hf:a b c"])
def test_hub_name_without_network_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be fetched from the Hub") as caught:
        open_checkpoint(name)
    assert caught.value.file == name
