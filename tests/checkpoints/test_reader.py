"""Reading tensors in pieces from files that may change, vanish or run out while they are open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.errors import CheckpointError

StateDict = dict[str, torch.Tensor]
Writer = Callable[..., Path]


@pytest.fixture
def path(write_file: Writer) -> Path:
    tensors = {"a": torch.arange(100.0), "b": torch.arange(50.0), "empty": torch.empty(0)}
    return write_file("model.safetensors", tensors)


def test_pieces_join_to_the_whole(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    found = bytearray(400)
    for start in range(0, 400, 7):
        checkpoint.read_into("a", memoryview(found)[start : start + 7], start)
    assert bytes(found) == torch.arange(100.0).numpy().tobytes()
    checkpoint.close()


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:3]], at))
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.read("a"), torch.arange(100.0))
    checkpoint.close()


@pytest.mark.parametrize("missing", [8, 200])  # a part of the tensor, or all of it
def test_file_that_shrinks_is_noticed(missing: int, path: Path) -> None:
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size - missing)
    with pytest.raises(CheckpointError, match="became shorter") as caught:
        checkpoint.read("b")
    assert caught.value.tensor == "b"
    checkpoint.close()


def test_file_that_is_rewritten_is_noticed(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.check_unchanged()
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was modified while it was being read"):
        checkpoint.check_unchanged()


def test_file_that_vanishes_is_noticed(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.check_unchanged()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.read("a")


def test_disk_error_names_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        checkpoint.read("a")
    assert caught.value.file == str(path)
    checkpoint.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="not on this platform")
def test_prefetch_asks_for_the_tensor_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:3]))
    checkpoint = open_checkpoint(path)
    for name in ("b", "empty"):  # a length of 0 would mean the rest of the file
        checkpoint.prefetch(name)
    assert asked == [(checkpoint.tensors["b"].begin, 200)]
    checkpoint.close()


def test_closed_checkpoint_opens_again_on_use(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    for _ in range(3):
        assert checkpoint.read("b")[-1] == 49
        checkpoint.close()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
