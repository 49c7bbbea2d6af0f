"""Merges killed at random moments: nothing half-made is ever published, and resuming is exact."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

COMMAND = [sys.executable, "-m", "orthomerge_cli"]
SERVER = Path(__file__).with_name("merge_server.py")
TENSORS, SHARDS = 16, 4
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]


def write_model(folder: Path, seed: int) -> Path:
    """Write 12 MB in four shards."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for shard in range(SHARDS):
        filename = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        names = [f"layers.{i}.weight" for i in range(shard, TENSORS, SHARDS)]
        tensors = {name: torch.randn(192, 1024, generator=generator) for name in names}
        save_file(tensors | {f"ids.{shard}": torch.arange(9)}, folder / filename)
        weight_map |= dict.fromkeys([*tensors, f"ids.{shard}"], filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"dtype": "float32"}')
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for(path: Path, process_id: int) -> None:
    """Wait until the path exists; fail if the process ends or dawdles first."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"process {process_id} made no {path}"
        time.sleep(0.0002)


def wait_for_entries(output: Path, count: int) -> None:
    """Wait until the run's journal holds so many entries, or the run has published its output."""
    journal = output.with_name(f"{output.name}.partial") / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not output.exists():
        if (
            journal.exists() and len(journal.read_bytes().splitlines()) > count
        ):  # the first is its head
            return
        assert time.monotonic() < deadline, f"no {count} entries in {journal}"
        time.sleep(0.0002)


@dataclass
class Server:
    """Runs the command line; see ``merge_server``."""

    process: subprocess.Popen[str]
    folder: Path

    def start(self, arguments: Sequence[str], *, pause: float = 0.0, sync: int = 1 << 20) -> int:
        request = {"arguments": arguments, "pause": pause, "sync_bytes": sync}
        places = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request | places) + "\n")
        self.process.stdin.flush()
        return int(self.answer())

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def wait(self) -> int:
        """Return the exit code; until it is asked for, the child keeps its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.answer())

    def kill(self, child: int, stop: signal.Signals = signal.SIGKILL) -> int:
        os.kill(child, stop)
        return self.wait()

    def run(self, arguments: Sequence[str]) -> int:
        self.start(arguments)
        return self.wait()

    def facts(self) -> dict[str, Any]:
        found = json.loads((self.folder / "stdout").read_text())
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, str(SERVER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        found = Server(process, tmp_path_factory.mktemp("server"))
        assert found.answer() == "ready\n"
        yield found


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    base, first, second = (str(write_model(folder / name, i)) for i, name in enumerate("abc"))
    return [
        *("merge", "--json", first, second, "--base", base, "--method", "task-arithmetic"),
        *("--workers", "2", "--max-shard-size", "3MB", "--output"),
    ]


@pytest.fixture(scope="module")
def expected(
    server: Server, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "merged"
    assert server.run([*arguments, str(output)]) == 0
    files = files_of(output)
    assert len(files) == 6 + 4  # shards; index, config, provenance, card
    return files


def assert_nothing_half_made(output: Path, expected: dict[str, bytes]) -> None:
    if output.exists():
        assert files_of(output) == expected


def finish(server: Server, command: list[str], output: Path) -> int:
    """Resume, or start afresh where there is nothing to resume; return the resumed tensors."""
    if output.exists():
        code = server.run([*command, "--overwrite"])
    else:
        code = server.run([*command, "--resume"])
        if code == 3:
            assert server.facts()["problem"] == "there is no interrupted run to resume"
            code = server.run(command)
    assert code == 0, server.facts()
    return int(server.facts()["resumed_tensors"])


def test_killed_merge_resumes_to_the_same_bytes(
    server: Server, arguments: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    choose, pause, resumed = random.Random(0), 0.004, []
    child = server.start([*arguments, str(tmp_path / "timed")], pause=pause)
    wait_for(tmp_path / "timed.partial", child)
    appeared = time.monotonic()
    assert server.wait() == 0
    duration = time.monotonic() - appeared
    for kill in range(14):
        output = tmp_path / str(kill) / "merged"
        command = [*arguments, str(output)]
        child = server.start(command, pause=pause)
        wait_for(output.with_name("merged.partial"), child)
        if kill < 10:
            wait_for_entries(output, choose.randint(0, 15))
            time.sleep(choose.uniform(0, 4 * pause))
        else:  # near the end, where the output is published
            time.sleep(duration * choose.uniform(0.9, 1.1))
        assert server.kill(child) in (0, -signal.SIGKILL)
        assert_nothing_half_made(output, expected)
        if kill % 3 == 0 and not output.exists():  # killed again while it resumes
            child = server.start([*command, "--resume"], pause=pause)
            time.sleep(duration * choose.uniform(0, 0.3))
            server.kill(child)
            assert_nothing_half_made(output, expected)
        resumed.append(finish(server, command, output))
        assert files_of(output) == expected
        assert os.listdir(output.parent) == ["merged"]
    assert sum(count > 0 for count in resumed) >= 6, "too few kills hit the middle of the work"


def test_output_is_whole_from_the_moment_it_is_seen(
    server: Server, arguments: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    for kill in range(3):
        output = tmp_path / str(kill) / "merged"
        command = [*arguments, str(output)]
        child = server.start(command)
        wait_for(output, child)
        server.kill(child)
        assert files_of(output) == expected
        finish(server, command, output)
        assert files_of(output) == expected
        assert os.listdir(output.parent) == ["merged"]


def test_killed_command_resumes_to_the_same_bytes(
    server: Server, arguments: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    for kill, delay in enumerate([0.0, 0.05, 0.15]):
        output = tmp_path / str(kill) / "merged"
        command = [*arguments, str(output)]
        with subprocess.Popen([*COMMAND, *command], stdout=subprocess.DEVNULL) as child:
            wait_for(output.with_name("merged.partial"), child.pid)
            time.sleep(delay)
            child.kill()
        assert_nothing_half_made(output, expected)
        finish(server, command, output)
        assert files_of(output) == expected
        assert os.listdir(output.parent) == ["merged"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_merge_says_how_to_resume_and_does(
    stop: signal.Signals,
    server: Server,
    arguments: list[str],
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    output = tmp_path / "merged"
    child = server.start([*arguments, str(output)], pause=0.05, sync=1 << 40)
    wait_for(output.with_name("merged.partial") / "out", child)
    time.sleep(0.2)
    assert server.kill(child, stop) == 130
    assert not output.exists()
    message = (server.folder / "stderr").read_text()
    resume = shlex.split(message.partition("Continue with: ")[2])
    assert resume == ["orthomerge", *arguments, str(output), "--resume"]
    assert server.run(resume[1:]) == 0
    assert server.facts()["resumed_tensors"] > 0
    assert files_of(output) == expected
