"""Run a command as a process of its own and measure it from outside.

The measuring process must stay small: on Linux a child starts with its parent's peak memory on
its account, so nothing here imports numpy or torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CommandFailed", "Sample", "child_environment", "end_children_on_terminate", "measure"]

_POLL_SECONDS = 0.02
_TAIL = 2000
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Sample:
    """One run of one command.

    Args:
        wall_seconds: From start to exit.
        cpu_seconds: User and system time of all its threads.
        peak_rss_bytes: Largest resident set, which counts mapped file pages.
        peak_anonymous_bytes: Largest part of it that is no file page, as far as looking every
            20 ms can tell; None where /proc does not say.
        load_before: Load average of the last minute when it was started.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int | None
    load_before: float


class CommandFailed(Exception):  # noqa: N818 - says what happened
    """A measured command did not exit with 0; holds the end of what it printed."""

    def __init__(self, command: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"exit code {code}: {' '.join(command)}\n{output[-_TAIL:]}")
        self.code = code


def child_environment() -> dict[str, str]:
    """Return this environment, offline and without thread settings: every tool's own defaults."""
    kept = {k: v for k, v in os.environ.items() if k not in _THREAD_SETTINGS}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def measure(
    command: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]
) -> Sample:
    """Run a command in ``folder`` with its output in ``log``.

    Raises:
        CommandFailed: It did not exit with 0.
    """
    load = os.getloadavg()[0]
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        watch = _AnonymousMemory(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            watch.stop()
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 took it from Popen
    if process.returncode:
        raise CommandFailed(command, process.returncode, log.read_text(errors="replace"))
    cpu = usage.ru_utime + usage.ru_stime
    return Sample(wall, cpu, usage.ru_maxrss * 1024, watch.peak_bytes, load)


def end_children_on_terminate() -> None:
    """Let SIGTERM unwind as Ctrl-C does: a measured child must not outlive its measurement."""

    def unwind(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, unwind)


class _AnonymousMemory:
    """Watch a process's anonymous memory from a thread."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes: int | None = None
        self._status = Path(f"/proc/{pid}/status")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            with contextlib.suppress(OSError):
                for line in self._status.read_text().splitlines():
                    if line.startswith("RssAnon:"):
                        self.peak_bytes = max(self.peak_bytes or 0, int(line.split()[1]) * 1024)
