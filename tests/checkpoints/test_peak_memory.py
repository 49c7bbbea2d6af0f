"""A merge's memory does not grow with its files: peak resident size of a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow
ALLOWANCE_BYTES = 48 << 20  # for files of 200 MB, the largest tensor of which has 120 MB

# Not ru_maxrss: it starts at the size of the process that started this one.
SCRIPT = """
import atexit, json, pathlib, re
import orthomerge.merging.run, orthomerge_cli.main

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

start = peak()
atexit.register(lambda: print(json.dumps([start, peak()])))
orthomerge_cli.main.main()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("large")
    tile = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    paths = []
    for name in ("first", "second"):
        tensors = {"large": tile.repeat(30).reshape(3000, -1)}
        tensors |= {f"small.{i}": tile.repeat(2) + i for i in range(10)}
        paths.append(str(folder / f"{name}.safetensors"))
        save_file(tensors, paths[-1])
    yield paths
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with /proc")
@pytest.mark.parametrize("shard_size", ["5GB", "20MB"])
def test_peak_memory_is_far_below_the_file_size(
    shard_size: str, models: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    arguments = [
        "merge",
        *models,
        "-m",
        "linear",
        "-o",
        str(output),
        "--max-shard-size",
        shard_size,
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments, "--workers", "2"],
        capture_output=True,
        check=True,
        text=True,
    )
    start, peak = json.loads(done.stdout)
    assert sum(path.stat().st_size for path in output.glob("*.safetensors")) > 200_000_000
    shutil.rmtree(output)
    assert 0 < start < peak < start + ALLOWANCE_BYTES
