"""Parameters of merge methods: declared by a method's signature, checked from plain values.

A parameter is a keyword-only argument with a default; its annotation says what is allowed
(``float``, ``int``, ``bool``, ``str``, ``Literal[...]``, a number ``| Literal[...]`` for words in
its place, ``Annotated[..., Between(...)]``, each with ``| None`` for "let the method decide", or
``NestedMethod``). How a value may vary from tensor
to tensor is in ``rules``.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from orthomerge.errors import RecipeError
from orthomerge.merging.spaces import Space

__all__ = [
    "Between",
    "Density",
    "NestedLoraMethod",
    "NestedMethod",
    "Parameter",
    "declared_parameters",
]


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


@dataclass(frozen=True, slots=True)
class _Nested:
    """Marks a parameter whose value names another method, with that method's parameters."""

    space: Space = Space.DELTA


#: Another method of DELTA space, as its name or as ``{method: name, parameter: value, ...}``; None
#: lets the outer method decide. The function gets the mapping with every parameter filled in.
NestedMethod = Annotated[Mapping[str, Any] | str | None, _Nested()]

#: Likewise, a method that can merge low-rank factors.
NestedLoraMethod = Annotated[Mapping[str, Any] | str | None, _Nested(Space.FACTORS)]

#: The kept fraction of a task vector's entries.
Density = Annotated[float, Between(0, 1, open_low=True)]


_KINDS: dict[type, str] = {
    float: "number",
    int: "integer",
    bool: "true | false",
    str: "text",
    dict: "a method of task vectors, or {method: name, parameter: value, ...}",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Args:
        name: As written in recipes and with ``--set``.
        kind: ``float``, ``int``, ``bool`` or ``str``; ``dict`` for a nested method.
        default: Its default.
        choices: Allowed strings, for a choice; beside a number, words that may take its place.
        bounds: Allowed range, for a number.
        help: One line from the method's docstring.
        optional: Whether null may be given, which lets the method decide.
        nested_space: What a nested method must merge.
    """

    name: str
    kind: type
    default: Any
    choices: tuple[str, ...] = ()
    bounds: Between | None = None
    help: str = ""
    optional: bool = False
    nested_space: Space = Space.DELTA

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
        if self.kind is dict:
            return self._nested(value)
        converted = value if value in self.choices else self._convert(value)
        if isinstance(converted, str):
            refused = bool(self.choices) and converted not in self.choices
        else:
            refused = self.bounds is not None and not self.bounds.holds(converted)
        if refused:
            raise self._refusal(value)
        return converted

    def _nested(self, value: Any) -> dict[str, Any]:
        from orthomerge.merging.nesting import nested_method

        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("method"), str):
            raise self._refusal(value)
        return nested_method(self.name, value, self.nested_space)

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
        raise self._refusal(value)

    def _refusal(self, value: Any) -> RecipeError:
        return RecipeError(f"parameter '{self.name}'", expected=self.allowed, found=repr(value))


def declared_parameters(function: Callable[..., Any], reserved: set[str]) -> dict[str, Parameter]:
    """Read a method's parameters from its signature and its docstring's Args.

    Args:
        function: The method; keyword-only arguments that are not ``reserved`` are parameters.
        reserved: Arguments the engine itself supplies.
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
            annotation = eval(annotation, namespace)  # the method's own source, as get_type_hints
        parameters[argument.name] = _parameter(argument, annotation, help_lines)
    return parameters


def _parameter(
    argument: inspect.Parameter, annotation: Any, help_lines: Mapping[str, str]
) -> Parameter:
    bounds = nested = None
    if typing.get_origin(annotation) is Annotated:
        bounds = next((m for m in annotation.__metadata__ if isinstance(m, Between)), None)
        nested = next((m for m in annotation.__metadata__ if isinstance(m, _Nested)), None)
        annotation = typing.get_args(annotation)[0]
    annotation, choices, optional = _alternatives(annotation)
    kind = dict if nested else annotation
    if kind not in _KINDS or argument.default is argument.empty:
        raise TypeError(f"parameter '{argument.name}' needs a plain type and a default")
    help_line = help_lines.get(argument.name, "")
    space = nested.space if nested else Space.DELTA
    return Parameter(
        argument.name, kind, argument.default, choices, bounds, help_line, optional, space
    )


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
