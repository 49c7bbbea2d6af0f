"""What all commands share: how errors end the program, and how results are printed.

Exit codes: 0 ok, 1 bug, 2 usage, 3 checkpoint or adapter, 4 recipe, 5 numerical, 6 resources,
7 verification mismatch, 130 interrupted.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from orthomerge.errors import OrthoMergeError, ProblemsError

__all__ = [
    "INTERRUPTED",
    "SESSION",
    "Session",
    "print_json",
    "printable",
    "resumable",
    "run_guarded",
    "say",
]

USAGE, INTERRUPTED = 2, 130
# Wherever this version of typer has it from.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


@dataclass
class Session:
    """Settings of this invocation that every command needs."""

    debug: bool = False
    json: bool = False


SESSION = Session()


def run_guarded(app: Callable[..., Any], arguments: Sequence[str]) -> int:
    """Run the application and turn its errors into one message and an exit code.

    ``--debug`` shows the trace; with ``--json`` the error is one JSON object on standard output.
    """
    SESSION.debug = SESSION.json = False
    try:
        code = app(list(arguments), standalone_mode="--json" not in arguments)
        return code if isinstance(code, int) else 0
    except _UsageError as error:  # only with --json: otherwise typer prints it
        print_json({"error": "UsageError", "exit_code": USAGE, "problem": str(error).rstrip(".")})
        return USAGE
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else 1
    except OrthoMergeError as error:
        return _report(error)
    except KeyboardInterrupt:
        say("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        sys.stderr.close()
        return 0
    except Exception as error:
        return _report_bug(error)


def printable(text: str) -> str:
    """Spell control characters out: names come from files of strangers."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text: str, *, err: bool = False) -> None:
    """Print text, with control characters spelled out."""
    typer.echo(printable(text), err=err)


def print_json(content: Any) -> None:
    """Print one JSON object on standard output."""
    from orthomerge.checkpoints.json_text import json_text

    typer.echo(json_text(content))


@contextmanager
def resumable(*stops: type[BaseException]) -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, and say then how the command is continued.

    Args:
        stops: What else the block raises when it has been interrupted.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    interruptions: tuple[type[BaseException], ...] = (KeyboardInterrupt, *stops)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except interruptions:
        arguments = [a for a in sys.argv[1:] if a != "--resume"]
        command = shlex.join(["orthomerge", *arguments, "--resume"])
        say(f"interrupted. Continue with: {command}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _report(error: OrthoMergeError) -> int:
    if SESSION.debug:
        import traceback

        traceback.print_exception(error)
    if SESSION.json:
        print_json(error.as_dict())
    else:
        count = len(error.problems) if isinstance(error, ProblemsError) else 1
        head = "error: " if count == 1 else ""
        say(f"{head}{error}", err=True)
    return error.exit_code


def _report_bug(error: Exception) -> int:
    if SESSION.debug:
        import traceback

        traceback.print_exception(error)
    text = f"{type(error).__name__}: {error}"
    if SESSION.json:
        print_json({"error": "Bug", "exit_code": 1, "problem": text})
    else:
        say(f"this is a bug in orthomerge: {text}", err=True)
        say("Please report it with the output of the same command with --debug.", err=True)
    return 1
