"""Parameters of functions in a catalogue: declared by a signature, checked from plain values.

A parameter is a keyword-only argument with a default; its annotation says what is allowed
(``float``, ``int``, ``bool``, ``str``, ``Literal[...]``, a number ``| Literal[...]`` for words in
its place, ``Annotated[..., Between(...)]``, each with ``| None`` for "let the function decide", or
``Annotated`` with an ``OwnKind``). Which functions there are is not known here.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from orthomerge.errors import RecipeError

__all__ = ["Between", "OwnKind", "Parameter", "declared_parameters"]


@dataclass(frozen=True, slots=True)
class Between:
    """Allowed range of a number; an open end excludes the bound itself.

    Infinity is only allowed where ``infinite`` says that it means something.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    infinite: bool = False

    def holds(self, value: float) -> bool:
        """Return whether ``value`` lies in the range."""
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.open_low else '≥'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


_KINDS: dict[type, str] = {
    float: "number",
    int: "integer",
    bool: "true | false",
    str: "text",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a function.

    Args:
        name: As written in recipes and with ``--set``.
        kind: ``float``, ``int``, ``bool`` or ``str``; another type where a subclass checks it.
        default: Its default.
        choices: Allowed strings, for a choice; beside a number, words that may take its place.
        bounds: Allowed range, for a number.
        help: One line from the function's docstring.
        optional: Whether null may be given, which lets the function decide.
    """

    name: str
    kind: type
    default: Any
    choices: tuple[str, ...] = ()
    bounds: Between | None = None
    help: str = ""
    optional: bool = False

    @property
    def allowed(self) -> str:
        """Say in words what may be given."""
        bounds = f" {self.bounds}" if self.bounds else ""
        plain = [] if self.choices and self.kind is str else [_KINDS[self.kind] + bounds]
        return " | ".join([*plain, *self.choices, *(["null"] if self.optional else [])])

    def check(self, value: Any) -> Any:
        """Return ``value`` in the parameter's type.

        Raises:
            RecipeError: It is of another type or out of range.
        """
        if value is None and self.optional:
            return None
        converted = value if value in self.choices else self._convert(value)
        if isinstance(converted, str):
            refused = bool(self.choices) and converted not in self.choices
        else:
            refused = self.bounds is not None and not self.bounds.holds(converted)
        if refused:
            raise self.refusal(value)
        return converted

    def _convert(self, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        infinite = self.bounds is not None and self.bounds.infinite
        if (
            self.kind is float
            and is_number
            and (math.isfinite(value) or (value == math.inf and infinite))
        ):
            return float(value)
        if self.kind is int and is_number and float(value).is_integer():
            return int(value)
        if self.kind in (bool, str) and isinstance(value, self.kind):
            return value
        if value is False and "off" in self.choices:  # YAML reads a bare off as false
            return "off"
        raise self.refusal(value)

    def refusal(self, value: Any) -> RecipeError:
        """Return the error that says what is allowed in place of ``value``."""
        return RecipeError(f"parameter '{self.name}'", expected=self.allowed, found=repr(value))


class OwnKind(ABC):
    """A mark in ``Annotated`` that makes a parameter whose values only its own room understands."""

    @abstractmethod
    def parameter(self, name: str, default: Any, help: str, optional: bool) -> Parameter:
        """Return the parameter; its ``check`` reads the values."""


def declared_parameters(function: Callable[..., Any], reserved: set[str]) -> dict[str, Parameter]:
    """Read a function's parameters from its signature and its docstring's Args.

    Args:
        function: Its keyword-only arguments that are not ``reserved`` are parameters.
        reserved: Arguments that whoever calls it supplies.
    """
    namespace = {**getattr(function, "__globals__", {}), "torch": types.SimpleNamespace(Tensor=Any)}
    signature = inspect.signature(function)
    help_lines = _argument_help(inspect.getdoc(function) or "")
    parameters = {}
    for argument in signature.parameters.values():
        if argument.kind is not argument.KEYWORD_ONLY or argument.name in reserved:
            continue
        annotation = argument.annotation
        if isinstance(annotation, str):
            annotation = eval(annotation, namespace)  # the function's own source, as get_type_hints
        parameters[argument.name] = _parameter(argument, annotation, help_lines)
    return parameters


def _parameter(
    argument: inspect.Parameter, annotation: Any, help_lines: Mapping[str, str]
) -> Parameter:
    bounds = own = None
    if typing.get_origin(annotation) is Annotated:
        bounds = next((m for m in annotation.__metadata__ if isinstance(m, Between)), None)
        own = next((m for m in annotation.__metadata__ if isinstance(m, OwnKind)), None)
        annotation = typing.get_args(annotation)[0]
    kind, choices, optional = _alternatives(annotation)
    if (own is None and kind not in _KINDS) or argument.default is argument.empty:
        raise TypeError(f"parameter '{argument.name}' needs a plain type and a default")
    help_line = help_lines.get(argument.name, "")
    if own is not None:
        return own.parameter(argument.name, argument.default, help_line, optional)
    return Parameter(argument.name, kind, argument.default, choices, bounds, help_line, optional)


def _alternatives(annotation: Any) -> tuple[Any, tuple[str, ...], bool]:
    """Split ``X | Literal[...] | None`` into X, the words, and whether None was allowed.

    X is str where there are only words.
    """
    unions = (types.UnionType, typing.Union)
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in unions else [annotation]
    words = [part for part in parts if typing.get_origin(part) is Literal]
    plain = [part for part in parts if part not in words and part is not type(None)]
    choices = tuple(word for part in words for word in typing.get_args(part))
    if words and not plain:
        plain = [str]
    return (plain[0] if len(plain) == 1 else annotation), choices, type(None) in parts


def _argument_help(doc: str) -> dict[str, str]:
    """Return the text of each entry of a Google-style Args section."""
    entries: dict[str, str] = {}
    current = None
    for line in doc.partition("Args:\n")[2].splitlines():
        if line and not line.startswith("    "):
            break
        if line.startswith("    ") and line[4:5] not in ("", " ") and ":" in line:
            current, _, text = line.strip().partition(":")
            entries[current] = text.strip()
        elif current and line.strip():
            entries[current] += " " + line.strip()
    return entries
