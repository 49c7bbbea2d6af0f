"""A disk that fills up, fails or runs out of handles: one clear error, and a run to resume."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from writing import StateDict, assert_published, fill, start

from orthomerge.checkpoints import writer as writer_module
from orthomerge.errors import BudgetError


def fail_with(code: int) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.fixture
def tensors() -> StateDict:
    return {f"t{i}": torch.full((25,), float(i + 1)) for i in range(8)}  # 100 bytes each, no zeros


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "posix_fallocate"])
def test_full_disk_at_the_start_leaves_nothing_published(
    call: str, tmp_path: Path, tensors: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, fail_with(errno.ENOSPC), raising=False)
    with pytest.raises(BudgetError, match="the disk is full") as caught:
        start(tmp_path / "out", tensors)
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    writer = start(tmp_path / "out", tensors, resume=True)  # the lock is free again
    fill(writer, tensors)
    writer.publish({})
    assert_published(tmp_path / "out", tensors)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk_during_the_work_leaves_nothing_published(
    call: str, code: int, tmp_path: Path, tensors: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = start(tmp_path / "out", tensors)
    fill(writer, tensors, ["t0", "t1"])
    monkeypatch.setattr(os, call, fail_with(code))
    words = "cannot be written" if code == errno.EIO else "the disk is full"
    proceed = writer.flush if call == "fsync" else lambda: fill(writer, tensors, ["t2"])
    with pytest.raises(BudgetError, match=words):
        proceed()
    writer.abandon()
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    writer = start(tmp_path / "out", tensors, resume=True)
    assert set(writer.finished) == ({"t0", "t1"} if call == "pwrite" else set())
    fill(writer, tensors, set(tensors) - set(writer.finished))
    writer.publish({})
    assert_published(tmp_path / "out", tensors)


def test_full_disk_while_publishing_leaves_the_finished_tensors(
    tmp_path: Path, tensors: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = start(tmp_path / "out", tensors)
    fill(writer, tensors)
    monkeypatch.setattr(writer_module, "fsync_write", fail_with(errno.ENOSPC))
    with pytest.raises(BudgetError, match=r"Free some space, then continue with --resume\."):
        writer.publish({"config.json": b"{}"})
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    writer = start(tmp_path / "out", tensors, resume=True)
    assert set(writer.finished) == set(tensors)
    writer.publish({"config.json": b"{}"})
    assert_published(tmp_path / "out", tensors)


def test_failure_of_the_background_sync_reaches_the_worker(
    tmp_path: Path, tensors: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_SYNC_BYTES", 1)
    writer = start(tmp_path / "out", tensors)
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    fill(writer, tensors, ["t0"])
    writer._syncer.join(5)
    with pytest.raises(BudgetError, match="Input/output error"):
        fill(writer, tensors, ["t1"])
    writer.abandon()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts handles in /proc")
def test_too_many_shards_for_the_system_are_refused_with_advice(
    tmp_path: Path, tensors: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def limited(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("3-of-00008.safetensors"):
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", limited)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BudgetError, match=r"Too many open files.*ulimit -n"):
        start(tmp_path / "out", tensors, limit=100)
    assert len(os.listdir("/proc/self/fd")) == before
