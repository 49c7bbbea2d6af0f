"""The command lines of the demo, and running them as a user's shell would.

Every merge is a process of its own that starts ``orthomerge merge`` in the demo's folder, so that
each printed line can be typed there again. Nothing of the library is called directly.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orthomerge.demo.results import (
    ADAPTERS,
    BASE_FOLDER,
    FOLDED,
    FULL,
    FULL_MERGES,
    OFT_MERGES,
    MadeModel,
)
from orthomerge.errors import OrthoMergeError

__all__ = [
    "STRENGTHS",
    "MergeCommandError",
    "MergeJob",
    "merge_jobs",
    "run_merges",
]

# Fixed before any merge was measured, and tuned on no data.
STRENGTHS = {
    "linear": "mean of the weights",
    "task-arithmetic": "scale 0.4, a usual choice",
    "ties": "density 0.2, scale 1: the method's defaults",
    "tsv-m": "the method's defaults",
    "orthomerge": "the method's defaults",
    "lie-tsv": "the method's defaults",
}
_TASK_ARITHMETIC = ("--method", "task-arithmetic", "--set", "scale=0.4")
_TSV = ("--method", "tsv-m")
_TIES = ("--method", "ties", "--set", "density=0.2", "--set", "scale=1.0")
_WITH_BASE = ("--base", BASE_FOLDER)


class MergeCommandError(OrthoMergeError):
    """A merge command of the demo failed; carries the command and the exit code it ended with."""

    def __init__(self, command: str, exit_code: int, stderr: str, folder: Path) -> None:
        self.command, self.stderr = command, stderr
        self.exit_code = max(exit_code, 1)  # type: ignore[misc]  # negative: ended by a signal
        super().__init__(
            f"the demo's command '{command}' ended with exit code {exit_code}",
            file=folder,
            found=" ".join(stderr.split()) or None,
            remedy="Type the command in that folder, with --debug, to see more.",
        )


@dataclass(frozen=True)
class MergeJob:
    """One merge: what it is called in the table and the arguments of ``orthomerge merge``.

    Args:
        name: Name in the table.
        group: Group in the table.
        sources: Models to merge, relative to the demo's folder.
        options: Options before ``-o``.
        output: Folder to write, relative to the demo's folder.
        adapter: Whether the output is an adapter rather than a full checkpoint.
    """

    name: str
    group: str
    sources: tuple[str, ...]
    options: tuple[str, ...]
    output: str
    adapter: bool = False

    @property
    def arguments(self) -> list[str]:
        """Return everything after ``orthomerge``."""
        return ["merge", *self.sources, *self.options, "-o", self.output]

    @property
    def command(self) -> str:
        """Return the line to type in the demo's folder."""
        return shlex.join(["orthomerge", *self.arguments])


def merge_jobs(domains: Sequence[str]) -> list[MergeJob]:
    """List the merges of the experts for these domains.

    The OFT experts are merged twice: as adapters, where their rotations are averaged, and folded
    into the base as ordinary checkpoints, where only their weights are. Both start from the same
    experts, so these rows may be compared with each other.
    """
    full = tuple(f"{FULL}/{domain}" for domain in domains)
    files = tuple(f"{folder}/model.safetensors" for folder in full)
    adapters = tuple(f"{ADAPTERS}/{domain}" for domain in domains)
    folded = tuple(f"{FOLDED}/{domain}" for domain in domains)
    rotations = ("--method", "orthomerge")
    return [
        _job("linear", FULL_MERGES, files, ("--method", "linear"), "full-linear"),
        _job(
            "task-arithmetic",
            FULL_MERGES,
            full,
            (*_WITH_BASE, *_TASK_ARITHMETIC),
            "full-task-arithmetic",
        ),
        _job("ties", FULL_MERGES, full, (*_WITH_BASE, *_TIES), "full-ties"),
        _job("tsv-m", FULL_MERGES, full, (*_WITH_BASE, *_TSV), "full-tsv-m"),
        _job("orthomerge", FULL_MERGES, full, (*_WITH_BASE, *rotations), "full-orthomerge"),
        _job("linear, folded", OFT_MERGES, folded, ("--method", "linear"), "oft-linear"),
        _job(
            "task-arithmetic, folded",
            OFT_MERGES,
            folded,
            (*_WITH_BASE, *_TASK_ARITHMETIC),
            "oft-task-arithmetic",
        ),
        _job("ties, folded", OFT_MERGES, folded, (*_WITH_BASE, *_TIES), "oft-ties"),
        _job("tsv-m, folded", OFT_MERGES, folded, (*_WITH_BASE, *_TSV), "oft-tsv-m"),
        MergeJob(
            "lie-tsv, adapter",
            OFT_MERGES,
            adapters,
            ("--method", "lie-tsv"),
            "merges/oft-lie-tsv-adapter",
            adapter=True,
        ),
        MergeJob(
            "orthomerge, adapter",
            OFT_MERGES,
            adapters,
            rotations,
            "merges/oft-orthomerge-adapter",
            adapter=True,
        ),
        _job(
            "orthomerge, checkpoint",
            OFT_MERGES,
            adapters,
            (*_WITH_BASE, *rotations),
            "oft-orthomerge",
        ),
    ]


def _job(
    name: str, group: str, sources: tuple[str, ...], options: tuple[str, ...], folder: str
) -> MergeJob:
    return MergeJob(name, group, sources, options, f"merges/{folder}")


def run_merges(jobs: Sequence[MergeJob], folder: Path) -> list[MadeModel]:
    """Run the commands in the demo's folder, two at a time, and return the merged models.

    Raises:
        MergeCommandError: A command failed; the first of them in the jobs' order.
    """
    (folder / "merges").mkdir(exist_ok=True)
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: _run(job, folder), jobs))


def _run(job: MergeJob, folder: Path) -> MadeModel:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "orthomerge_cli", *job.arguments],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise MergeCommandError(job.command, done.returncode, done.stderr, folder)
    return MadeModel(
        job.name,
        job.group,
        job.output,
        adapter=job.adapter,
        command=job.command,
        seconds=time.perf_counter() - start,
    )
