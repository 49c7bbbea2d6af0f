"""What a resumed run believes of an interrupted one, and that doubt never ends in zeros."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.layout import plan_layout
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.checkpoints.staging import Staging
from orthomerge.checkpoints.writer import StreamingWriter
from orthomerge.errors import ResumeError

NAMES = [f"t{i}" for i in range(6)]
FIRST = "model-00001-of-00003.safetensors"


def start(output: Path, **flags: bool) -> StreamingWriter:
    infos = [TensorInfo(name, "F32", (25,)) for name in NAMES]
    layout = plan_layout(infos, max_shard_bytes=200)  # two tensors in each of three shards
    return StreamingWriter(layout, Staging(output, "plan", [["a", 1]], **flags))


def fill(writer: StreamingWriter, names: list[str]) -> None:
    for name in names:
        value = torch.full((25,), 1.0 + NAMES.index(name))
        writer.write(name, 0, memoryview(value.numpy().tobytes()))
        writer.finish(name, {"of": name})


def finish(writer: StreamingWriter) -> None:
    fill(writer, [name for name in NAMES if name not in writer.finished])
    writer.publish({})


def assert_right(output: Path) -> None:
    checkpoint = open_checkpoint(output)
    for i, name in enumerate(NAMES):
        assert checkpoint.read(name).tolist() == [1.0 + i] * 25, name
    checkpoint.close()
    assert not output.with_name(output.name + ".partial").exists()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return an output whose run was interrupted after t0 to t3."""
    writer = start(tmp_path / "out")
    fill(writer, NAMES[:4])
    writer.abandon()
    return tmp_path / "out"


@pytest.fixture
def journal(output: Path) -> Path:
    return output.with_name("out.partial") / "journal.jsonl"


def test_resumed_run_has_what_was_finished_with_its_details(output: Path) -> None:
    writer = start(output, resume=True)
    assert writer.finished == {name: {"of": name} for name in NAMES[:4]}
    finish(writer)
    assert_right(output)


def test_run_resumes_as_often_as_it_is_interrupted(output: Path) -> None:
    for name in NAMES[4:]:
        writer = start(output, resume=True)
        fill(writer, [name])
        writer.abandon()
    writer = start(output, resume=True)
    assert set(writer.finished) == set(NAMES)
    finish(writer)
    assert_right(output)


@pytest.mark.parametrize("torn", [b"{", b'{"tensor": "t4", "details": null}', b"\0" * 40])
def test_torn_last_line_does_not_count(torn: bytes, output: Path, journal: Path) -> None:
    with journal.open("ab") as file:
        file.write(torn)
    writer = start(output, resume=True)
    assert set(writer.finished) == set(NAMES[:4])
    fill(writer, ["t4"])
    writer.abandon()
    writer = start(output, resume=True)  # what was appended after the torn line is whole
    assert set(writer.finished) == set(NAMES[:5])
    finish(writer)
    assert_right(output)


@pytest.mark.parametrize("line", [b"[]\n", b"nonsense\n", b"1\n", b"{}\n", b"\xff\0\n"])
def test_journal_counts_up_to_its_first_damaged_line(
    line: bytes, output: Path, journal: Path
) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], line, *lines[3:]]))
    writer = start(output, resume=True)
    assert set(writer.finished) == set(NAMES[:2])
    finish(writer)
    assert_right(output)


@pytest.mark.parametrize("damage", ["deleted", "shorter", "longer"])
def test_journal_without_its_shard_is_not_believed(damage: str, output: Path) -> None:
    shard = output.with_name("out.partial") / "out" / FIRST
    if damage == "deleted":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size + (1 if damage == "longer" else -1))
    writer = start(output, resume=True)
    assert set(writer.finished) == {"t2", "t3"}
    finish(writer)
    assert_right(output)


def test_lost_shard_stays_lost_over_a_second_interruption(output: Path) -> None:
    (output.with_name("out.partial") / "out" / FIRST).unlink()
    writer = start(output, resume=True)  # makes the shard anew, full of zeros
    fill(writer, ["t1"])
    writer.abandon()
    writer = start(output, resume=True)
    assert set(writer.finished) == {"t1", "t2", "t3"}
    finish(writer)
    assert_right(output)


def test_journal_that_outlived_its_publication_is_not_believed(output: Path) -> None:
    partial = output.with_name("out.partial")
    kept = (partial / "journal.jsonl").read_bytes()
    finish(start(output, resume=True))
    partial.mkdir()
    (partial / "journal.jsonl").write_bytes(kept)  # killed between publishing and cleaning up
    writer = start(output, resume=True, overwrite=True)
    assert writer.finished == {}
    finish(writer)
    assert_right(output)


@pytest.mark.parametrize(
    ("plan", "inputs", "words"),
    [("other", [["a", 1]], "the plan changed"), ("plan", [["a", 2]], "the inputs changed")],
)
def test_resume_is_refused_after_a_change(
    plan: str, inputs: list[Any], words: str, output: Path, journal: Path
) -> None:
    before = journal.read_bytes()
    with pytest.raises(ResumeError, match=words) as caught:
        Staging(output, plan, inputs, resume=True)
    assert "--overwrite" in str(caught.value)
    assert journal.read_bytes() == before
    finish(start(output, resume=True))  # with the first settings it still goes on
    assert_right(output)


def test_resume_of_another_format_is_refused(output: Path, journal: Path) -> None:
    head, *rest = journal.read_bytes().splitlines(keepends=True)
    changed = {**json.loads(head), "version": 0}
    journal.write_bytes(json.dumps(changed).encode() + b"\n" + b"".join(rest))
    with pytest.raises(ResumeError, match="the format changed"):
        start(output, resume=True)


@pytest.mark.parametrize("there", ["nothing", "folder", "torn head"])
def test_resume_without_an_interrupted_run_is_refused(there: str, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    if there != "nothing":
        partial.mkdir()
    if there == "torn head":
        (partial / "journal.jsonl").write_bytes(b'{"version": 1, "pl')
    with pytest.raises(ResumeError, match="there is no interrupted run to resume"):
        start(tmp_path / "out", resume=True)
    finish(start(tmp_path / "out"))
    assert_right(tmp_path / "out")


def test_files_of_another_layout_are_not_published(output: Path) -> None:
    folder = output.with_name("out.partial") / "out"
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"stray")
    (folder / "stray").mkdir()
    finish(start(output, resume=True))
    assert len(os.listdir(output)) == 4
    assert_right(output)


def test_start_afresh_forgets_what_was_finished(output: Path) -> None:
    writer = start(output, overwrite=True)
    assert writer.finished == {}
    finish(writer)
    assert_right(output)
