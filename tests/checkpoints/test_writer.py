"""The streaming writer: any order, any thread, the right bytes at the right place."""

from __future__ import annotations

import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from writing import StateDict, as_bytes, assert_published, fill, infos, start

from orthomerge.checkpoints import writer as writer_module
from orthomerge.checkpoints.layout import plan_layout
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.checkpoints.staging import Staging
from orthomerge.checkpoints.writer import MemoryWriter, StreamingWriter

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors() -> StateDict:
    return {f"t{i}": torch.full((25,), float(i + 1)) for i in range(8)}  # 100 bytes each, no zeros


def test_pieces_in_any_order_from_many_threads_make_the_reference_file(
    tmp_path: Path, state_dict: StateDict
) -> None:
    writer, choose = start(tmp_path / "ours", state_dict), random.Random(0)
    pieces = [
        (name, at, memoryview(as_bytes(tensor))[at : at + 5])
        for name, tensor in state_dict.items()
        for at in range(0, tensor.nbytes, 5)
    ]
    choose.shuffle(pieces)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: writer.write(*piece), pieces))
    for name in state_dict:
        writer.finish(name, None)
    writer.publish({})
    save_file(state_dict, tmp_path / "theirs.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(ours[name]) == as_bytes(tensor)


def test_short_writes_are_continued(
    tmp_path: Path, tensors: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, bytes(data[:7]), at))
    writer = start(tmp_path / "out", tensors)
    fill(writer, tensors)
    writer.publish({})
    assert_published(tmp_path / "out", tensors)


def test_shards_load_by_their_index_and_respect_the_limit(
    tmp_path: Path, tensors: StateDict
) -> None:
    writer = start(tmp_path / "out", tensors, limit=250)
    fill(writer, tensors)
    writer.publish({"config.json": b"{}"})
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*shards, INDEX, "config.json"])
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 800
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert torch.equal(file.get_tensor(name), tensors[name])
    assert_published(tmp_path / "out", tensors)


def test_single_file_gets_its_final_metadata(tmp_path: Path, tensors: StateDict) -> None:
    output = tmp_path / "out.safetensors"
    layout = plan_layout(
        infos(tensors), max_shard_bytes=1 << 40, filename=output.name, metadata={"k": "0" * 64}
    )
    writer = StreamingWriter(layout, Staging(output, "plan", []))
    fill(writer, tensors)
    writer.publish({}, single_file=True, metadata={"k": "final"})
    assert open_checkpoint(output).metadata == {"k": "final"}
    assert_published(output, tensors)


def test_memory_writer_holds_the_same_tensors(state_dict: StateDict) -> None:
    writer = MemoryWriter({info.name: info for info in infos(state_dict)})
    fill(writer, state_dict)
    for name, tensor in state_dict.items():
        found = writer.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds file names in /proc")
def test_tensor_is_journalled_only_after_its_data_is_synced(
    tmp_path: Path, tensors: StateDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    synced, record = os.fsync, Staging.record

    def note_sync(handle: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        synced(handle)

    def note_record(staging: Staging, entries: dict[str, Any]) -> None:
        events.extend(entries)
        record(staging, entries)

    writer = start(tmp_path / "out", tensors)
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Staging, "record", note_record)
    fill(writer, tensors, ["t3"])
    writer.flush()
    assert events == ["model.safetensors", "t3", "journal.jsonl"]
    writer.abandon()


@pytest.mark.parametrize(("sync_bytes", "count"), [(100, 1), (1 << 40, 0)])
def test_journal_is_written_in_batches_while_the_work_goes_on(
    sync_bytes: int,
    count: int,
    tmp_path: Path,
    tensors: StateDict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = threading.Event()
    record = Staging.record
    monkeypatch.setattr(writer_module, "_SYNC_BYTES", sync_bytes)
    monkeypatch.setattr(Staging, "record", lambda *args: (record(*args), recorded.set()))
    writer = start(tmp_path / "out", tensors)
    fill(writer, tensors, ["t0"])
    assert recorded.wait(5 if count else 0.2) is bool(count)
    journal = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 1 + count
    writer.abandon()
