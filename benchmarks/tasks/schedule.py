"""A list of pieces of work whose results are files: what is there is not done again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Work", "carry_out", "estimate", "write_json"]

_UNKNOWN_SECONDS = {"expert": 40.0, "cell": 150.0}


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Args:
        label: For the report of progress.
        kind: ``expert`` or ``cell``.
        path: The file whose presence says that it is done; holds ``seconds`` or
            ``seconds.total``.
        like: Glob of files that took about as long.
        run: Does it.
    """

    label: str
    kind: str
    path: Path
    like: str
    run: Callable[[], Any]

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return self.path.exists()

    def seconds(self, root: Path) -> float:
        """Return how long it will take: what its like took, on the whole."""
        found = [_seconds(path) for path in sorted(root.glob(self.like))[:20]]
        return sum(found) / len(found) if found else _UNKNOWN_SECONDS[self.kind]


def _seconds(path: Path) -> float:
    seconds = json.loads(path.read_text())["seconds"]
    return float(seconds["total"] if isinstance(seconds, dict) else seconds)


def estimate(works: Iterable[Work], root: Path) -> dict[str, tuple[int, float]]:
    """Return how many pieces are left of each kind, and their seconds together."""
    left: dict[str, tuple[int, float]] = {}
    known: dict[str, float] = {}
    for work in works:
        if not work.done:
            seconds = known.setdefault(work.like, work.seconds(root))
            count, total = left.get(work.kind, (0, 0.0))
            left[work.kind] = (count + 1, total + seconds)
    return left


def carry_out(
    works: Sequence[Work], root: Path, deadline: float | None, say: Callable[[str], None]
) -> bool:
    """Do what is left, in order.

    Args:
        works: All pieces.
        root: Of the globs.
        deadline: Value of ``time.monotonic()`` after which nothing may end.
        say: Progress.

    Returns:
        Whether everything is done.
    """
    for work in works:
        if work.done:
            continue
        started = time.monotonic()
        if deadline is not None and started + work.seconds(root) > deadline:
            say("no time for the next piece: call again to continue")
            return False
        work.run()
        say(f"{work.label}: {time.monotonic() - started:.0f} s")
    return True


def write_json(path: Path, content: Any) -> None:
    """Write a file, whole or not at all; several processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
