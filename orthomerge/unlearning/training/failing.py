"""Turn what libraries raise when disk or memory runs out into errors of ours.

safetensors and torch's writer have exceptions of their own for a full disk, which name no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orthomerge.errors import BudgetError

__all__ = ["resources_told"]

_FULL = (28, 27, 122)  # no space, file too large, quota exceeded
_WRITER = "inline_container"  # torch's, which loses the system's reason on the way
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def resources_told(output: Path) -> Iterator[None]:
    """Raise ``BudgetError`` for whatever in the block failed for want of disk or memory.

    Args:
        output: What was being made.

    Raises:
        BudgetError: The disk is full or cannot be written, or memory does not suffice.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        raise _told(error, output) or error from error.__cause__
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise _told(error, output) or error from error.__cause__


def _told(error: Exception, output: Path) -> BudgetError | None:
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _MEMORY):
        return BudgetError(
            f"memory does not suffice: {text.partition(chr(10))[0] or 'nothing is left'}",
            remedy="Lower train.batch_size, set train.gradient_checkpointing, or train an adapter; "
            "the point of interruption stays for --resume.",
        )
    reason = _disk(error, text)
    if reason is None:
        return None
    return BudgetError(
        reason,
        file=output,
        remedy="Free some space, then run the same command again with --resume.",
    )


def _disk(error: Exception, text: str) -> str | None:
    """Return what is wrong with the disk, if anything is."""
    full = getattr(error, "errno", None) in _FULL or _WRITER in text
    if full or any(f"os error {number}" in text for number in _FULL):
        return "the disk is full"
    if isinstance(error, OSError):
        return f"cannot be written: {error.strerror or error}"
    return f"cannot be written: {text}" if "os error" in text else None
