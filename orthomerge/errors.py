"""Every error orthomerge raises on purpose, with the exit code the command line gives it.

An error keeps its facts as attributes and builds its own text from them; rendering for a terminal
or as JSON happens in the command line, not here.

::

    OrthoMergeError                 1   (never raised itself)
    ├── CheckpointError             3   a tensor file or model folder is not what it should be
    │   ├── HeaderError             3   a safetensors header breaks the format
    │   ├── ShardIndexError         3   an index and its shards disagree
    │   ├── TensorMismatchError     3   tensors of several sources do not fit together
    │   ├── OutputError             3   the output may not be written where it was asked for
    │   └── ResumeError             3   an interrupted run cannot be continued
    ├── AdapterError                3   a PEFT adapter is malformed or of an unsupported kind
    ├── DataError                   3   rows of text, or their file, are not what they should be
    ├── RecipeError                 4   a recipe, parameter or combination is not valid
    │   └── UnknownNameError        4   a name is not registered; carries the nearest match
    ├── NumericalError              5   a value that must be finite or in range is not
    ├── BudgetError                 6   memory or disk does not suffice
    ├── MissingExtraError           6   an optional package is not installed
    ├── VerificationError           7   two things that must agree differ
    └── ProblemsError               –   several of the above, found together; the first one's code
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Self

__all__ = [
    "AdapterError",
    "BudgetError",
    "CheckpointError",
    "DataError",
    "HeaderError",
    "MissingExtraError",
    "NumericalError",
    "OrthoMergeError",
    "OutputError",
    "ProblemsError",
    "RecipeError",
    "ResumeError",
    "ShardIndexError",
    "TensorMismatchError",
    "UnknownNameError",
    "VerificationError",
    "combined",
    "nearest",
]


class OrthoMergeError(Exception):
    """Base of all errors that a user can cause or cure.

    The text is ``where: problem (expected …, found …). remedy``; every part is also an attribute.

    Args:
        problem: What is wrong, one clause, no trailing full stop.
        file: File or folder it was found in.
        tensor: Name of the tensor, module or key it concerns.
        expected: What would have been right.
        found: What was there instead.
        remedy: What to do next, one sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.remedy = remedy
        super().__init__(self._text())

    def _text(self) -> str:
        where = [part for part in (self.file, self.tensor and f"'{self.tensor}'") if part]
        facts = [
            f"{label} {value}"
            for label, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        text = ": ".join([*where, self.problem])
        if facts:
            text += f" ({', '.join(facts)})"
        return f"{text}. {self.remedy}" if self.remedy else text

    def at(self, file: str | Path) -> Self:
        """Say where it was found, if that is not known yet; return the error itself."""
        if self.file is None:
            self.file = str(file)
            self.args = (self._text(),)
        return self

    def about(self, tensor: str) -> Self:
        """Say which tensor it concerns, if that is not known yet; return the error itself."""
        if self.tensor is None:
            self.tensor = tensor
            self.args = (self._text(),)
        return self

    def as_dict(self) -> dict[str, object]:
        """Return the error's facts as one JSON-ready object."""
        facts = {
            "problem": self.problem,
            "file": self.file,
            "tensor": self.tensor,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
        }
        known = {key: value for key, value in facts.items() if value is not None}
        return {"error": type(self).__name__, "exit_code": self.exit_code, **known}


class CheckpointError(OrthoMergeError):
    """A tensor file or model folder is not what it should be."""

    exit_code = 3


class HeaderError(CheckpointError):
    """A safetensors header breaks the format, or the file does not match its header."""


class ShardIndexError(CheckpointError):
    """A shard index and the shards it names disagree."""


class TensorMismatchError(CheckpointError):
    """Tensors of several sources do not fit together."""


class OutputError(CheckpointError):
    """The output may not be written where it was asked for."""


class ResumeError(CheckpointError):
    """An interrupted run cannot be continued with what is there now."""


class AdapterError(OrthoMergeError):
    """A PEFT adapter is malformed, incompatible, or of a kind not supported."""

    exit_code = 3


class DataError(OrthoMergeError):
    """Rows of text, or the file they come from, are not what they should be."""

    exit_code = 3


class RecipeError(OrthoMergeError):
    """A recipe, a parameter value, or a combination of settings is not valid."""

    exit_code = 4


class UnknownNameError(RecipeError):
    """A name is not among the known ones; the text carries the nearest match.

    Args:
        kind: What was named, e.g. ``"method"``.
        name: The unknown name.
        known: All names that would have been right.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        known: Iterable[str],
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
    ) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        self.suggestion = nearest(name, self.known)
        listed = ", ".join(self.known) or "none"
        remedy = f"Did you mean '{self.suggestion}'?" if self.suggestion else f"Known: {listed}."
        super().__init__(f"unknown {kind} '{name}'", file=file, tensor=tensor, remedy=remedy)


class NumericalError(OrthoMergeError):
    """A value that must be finite, non-zero or in range is not."""

    exit_code = 5


class BudgetError(OrthoMergeError):
    """Memory or disk space does not suffice."""

    exit_code = 6


class MissingExtraError(OrthoMergeError):
    """An optional package is needed and not installed.

    Args:
        package: The package that could not be imported.
        extra: The extra of orthomerge that installs it.
        purpose: What it is needed for.
    """

    exit_code = 6

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            remedy=f"Run: pip install 'orthomerge[{extra}]'",
        )


class VerificationError(OrthoMergeError):
    """Two things that must agree differ."""

    exit_code = 7


_MOST_SHOWN = 20  # of several problems' texts; all stay in ``problems``


class ProblemsError(OrthoMergeError):
    """Several problems found together; each keeps its own facts.

    The exit code is the first problem's.
    """

    def __init__(self, problems: Sequence[OrthoMergeError]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} found")
        self.exit_code = self.problems[0].exit_code  # type: ignore[misc]

    def _text(self) -> str:
        shown = [f"  - {problem}" for problem in self.problems[:_MOST_SHOWN]]
        more = len(self.problems) - len(shown)
        return "\n".join([self.problem, *shown, *([f"  … and {more} more"] if more else [])])

    def as_dict(self) -> dict[str, object]:
        """Return the count and every problem's own facts."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "problem": self.problem,
            "problems": [problem.as_dict() for problem in self.problems],
        }


def combined(problems: Sequence[OrthoMergeError]) -> OrthoMergeError:
    """Return one error for one or more problems: the only one itself, or all in a list."""
    return problems[0] if len(problems) == 1 else ProblemsError(problems)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to ``name``, or None when nothing is close."""
    matches = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.55)
    return matches[0] if matches else None
