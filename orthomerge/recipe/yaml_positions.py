"""Load YAML into plain data and remember where each key and value stood.

Safe tags only, duplicate keys refused, aliases limited, so that a recipe from a stranger is data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orthomerge.errors import OrthoMergeError, RecipeError, combined

__all__ = ["Document", "load_recipe_file", "load_yaml", "load_yaml_file", "parse_value"]

_MAX_NODES = 100_000
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

#: Keys and list positions that lead to a value.
KeyPath = tuple[str | int, ...]


@dataclass
class Document:
    """Parsed YAML with positions.

    Args:
        data: Plain Python values.
        name: File name for messages.
        positions: Key path to (line, column), both from 1.
    """

    data: Any
    name: str
    positions: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Return ``file:line:column`` of a key path or its nearest known parent, else the name."""
        while path and path not in self.positions:
            path = path[:-1]
        if path not in self.positions:
            return self.name
        line, column = self.positions[path]
        return f"{self.name}:{line}:{column}"


def load_yaml(text: str, name: str) -> Document:
    """Parse YAML text.

    Raises:
        RecipeError: It is not valid YAML, with line and column.
        ProblemsError: Several keys appear twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        reader = _Reader(loader, Document(None, name))
        reader.document.data = reader.read(node, ()) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError(f"is not valid YAML: {error.problem}", file=place) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"is not valid YAML: {error}", file=name) from error
    finally:
        loader.dispose()
    if reader.problems:
        problems = reader.problems
        raise combined(problems)
    return reader.document


def load_yaml_file(path: Path) -> Document:
    """Parse a YAML file.

    Raises:
        RecipeError: It cannot be read or is not valid.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"cannot be read: {reason}", file=path) from error
    return load_yaml(text, str(path))


def load_recipe_file(path: Path, *, keys: str, remedy: str | None = None) -> Document:
    """Parse a YAML file that must be a mapping.

    Args:
        path: The file.
        keys: Which keys it needs at least, for the message: "key models".
        remedy: What to do if it is something else.

    Raises:
        RecipeError: It cannot be read, is not valid, or is no mapping.
    """
    document = load_yaml_file(path)
    if not isinstance(document.data, dict):
        problem = f"a recipe is a mapping with at least the {keys}"
        raise RecipeError(problem, file=path, remedy=remedy)
    return document


class _Loader(yaml.SafeLoader):
    """The safe loader, reading ``1e-6`` as a number: YAML 1.1 wants ``1.0e-6``, people do not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """Parse a small YAML value, such as the right side of ``--set``.

    Raises:
        yaml.YAMLError: It is not valid.
    """
    return yaml.load(text, _Loader)


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, document: Document) -> None:
        self.document = document
        self.problems: list[OrthoMergeError] = []
        self._loader = loader
        self._nodes = 0

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self._nodes += 1
        if self._nodes > _MAX_NODES or len(path) > 64:
            raise RecipeError("is too large or too deeply nested", file=self.document.name)
        self.document.positions.setdefault(path, _place(node))
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
            raise RecipeError(
                f"is not valid YAML: the tag {node.tag} is not allowed",
                file=_name(self.document, node),
            )
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, at)) for at, item in enumerate(node.value)]
        return self._loader.construct_object(node)

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            inner = (*path, key)
            if key in result:
                self.problems.append(
                    RecipeError(
                        f"the key '{key}' appears twice", file=_name(self.document, key_node)
                    )
                )
            self.document.positions[inner] = _place(key_node)
            result[key] = self.read(value_node, inner)
        return result


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _name(document: Document, node: yaml.Node) -> str:
    line, column = _place(node)
    return f"{document.name}:{line}:{column}"
