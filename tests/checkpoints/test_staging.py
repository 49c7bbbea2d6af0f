"""The partial folder: its lock, what it refuses, and the one rename that publishes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orthomerge.checkpoints import staging as staging_module
from orthomerge.checkpoints.staging import Staging
from orthomerge.errors import OutputError, ResumeError


def open_staging(output: Path, **flags: bool) -> Staging:
    return Staging(output, "plan", [], **flags)


def fill(staging: Staging, content: str = "new") -> None:
    (staging.files / "config.json").write_text(content)


def make_output(output: Path, content: str = "old") -> None:
    output.mkdir()
    (output / "config.json").write_text(content)


def content_of(output: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in output.iterdir()}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "sub" / "out"


def test_output_appears_only_when_published_and_nothing_else_stays(output: Path) -> None:
    staging = open_staging(output)
    fill(staging)
    assert os.listdir(output.parent) == ["out.partial"]
    staging.publish({"config.json"})
    assert os.listdir(output.parent) == ["out"]
    assert content_of(output) == {"config.json": "new"}


def test_single_file_is_published_as_itself(output: Path) -> None:
    staging = open_staging(output)
    fill(staging)
    staging.publish({"config.json"}, "config.json")
    assert os.listdir(output.parent) == ["out"]
    assert output.read_text() == "new"


@pytest.mark.parametrize("old", ["folder", "link to folder", "dangling link"])
def test_overwrite_replaces_what_was_there(old: str, output: Path, tmp_path: Path) -> None:
    output.parent.mkdir()
    make_output(output if old == "folder" else tmp_path / "target")
    if old != "folder":
        output.symlink_to(tmp_path / ("target" if old == "link to folder" else "nothing"))
    staging = open_staging(output, overwrite=True)
    fill(staging)
    staging.publish({"config.json"})
    assert content_of(output) == {"config.json": "new"}
    assert os.listdir(output.parent) == ["out"]
    if old != "folder":
        assert content_of(tmp_path / "target") == {"config.json": "old"}


@pytest.mark.parametrize("single_file", ["config.json", None])
def test_output_that_appeared_meanwhile_is_kept(single_file: str | None, output: Path) -> None:
    staging = open_staging(output)
    fill(staging)
    make_output(output, "precious")
    with pytest.raises(OutputError, match="has come to exist while it was being made"):
        staging.publish({"config.json"}, single_file)
    staging.close()
    assert content_of(output) == {"config.json": "precious"}
    assert (staging.files / "config.json").read_text() == "new"


def test_overwritten_folder_that_has_become_something_else_is_kept(output: Path) -> None:
    staging = open_staging(output, overwrite=True)
    fill(staging)
    make_output(output)
    (output / "documents").mkdir()
    with pytest.raises(OutputError, match="holds other folders"):
        staging.publish({"config.json"})
    staging.close()
    assert (output / "config.json").read_text() == "old"


def test_old_output_comes_back_when_the_rename_fails(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.parent.mkdir()
    make_output(output)
    staging = open_staging(output, overwrite=True)
    fill(staging)
    rename = Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if path == staging.files:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        staging.publish({"config.json"})
    staging.close()
    assert content_of(output) == {"config.json": "old"}


def test_discard_removes_everything_and_brings_the_old_output_back(output: Path) -> None:
    output.parent.mkdir()
    make_output(output)
    staging = open_staging(output, overwrite=True)
    fill(staging)
    output.rename(staging.root / "replaced")  # as if killed between the two renames
    staging.close()
    staging.discard()
    assert os.listdir(output.parent) == ["out"]
    assert content_of(output) == {"config.json": "old"}


def test_second_run_is_locked_out(output: Path) -> None:
    first = open_staging(output)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="another process is writing this output"):
            open_staging(output, **flags)
    first.close()
    open_staging(output, resume=True).close()


def test_second_process_is_locked_out_and_a_dead_one_is_not(output: Path) -> None:
    script = (
        "import sys, pathlib; from orthomerge.checkpoints.staging import Staging\n"
        "staging = Staging(pathlib.Path(sys.argv[1]), 'plan', [])\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(output)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match="another process is writing this output"):
            open_staging(output, overwrite=True)
        child.kill()
    open_staging(output, resume=True).close()


@pytest.mark.parametrize("replaced", [True, False])
def test_lock_of_a_folder_that_was_just_removed_does_not_count(
    replaced: bool, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, flock = output.with_name("out.partial") / "lock", staging_module.fcntl.flock

    def finish_just_before(handle: int, flags: int) -> None:
        lock.unlink()
        if replaced:
            lock.touch()
        flock(handle, flags)

    monkeypatch.setattr(staging_module.fcntl, "flock", finish_just_before)
    with pytest.raises(OutputError, match="another process is writing this output"):
        open_staging(output)


def test_interrupted_run_is_neither_lost_nor_continued_unasked(output: Path) -> None:
    open_staging(output).close()
    with pytest.raises(OutputError, match="left a partial output") as caught:
        open_staging(output)
    assert "--resume" in str(caught.value)
    open_staging(output, resume=True).close()
    open_staging(output, overwrite=True).close()


def test_start_afresh_clears_the_files(output: Path) -> None:
    staging = open_staging(output)
    fill(staging)
    staging.close()
    staging = open_staging(output, overwrite=True)
    assert os.listdir(staging.files) == []
    staging.close()


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["thesis.tex", "out/thesis.tex"])
def test_files_of_someone_else_are_left_alone(name: str, overwrite: bool, output: Path) -> None:
    path = output.with_name("out.partial") / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(OutputError, match="holds files that orthomerge did not write"):
        open_staging(output, overwrite=overwrite)
    assert path.read_text() == "precious"


def blocked_by_file(output: Path) -> None:
    output.parent.write_text("")


def blocked_partial(output: Path) -> None:
    output.parent.mkdir()
    output.with_name("out.partial").write_text("")


@pytest.mark.parametrize("block", [blocked_by_file, blocked_partial])
def test_folder_that_cannot_be_made_is_refused(block: Callable[[Path], None], output: Path) -> None:
    block(output)
    with pytest.raises(OutputError, match="cannot be written: "):
        open_staging(output)
    with pytest.raises((OutputError, ResumeError)):
        open_staging(output, resume=True)
