"""What the catalogues of merge methods and of unlearning objectives share: filling and looking up.

What an entry is, and how it registers itself, is in each catalogue's own ``registry``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from orthomerge.errors import UnknownNameError

__all__ = ["find_entry", "import_entries"]

_Entry = TypeVar("_Entry")


def import_entries(package: str, group: str) -> None:
    """Import every module of a package and every installed plug-in of an entry-point group.

    Args:
        package: Dotted name; each of its modules registers what it defines.
        group: Entry points whose loading registers something.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    for entry_point in entry_points(group=group):
        entry_point.load()


def find_entry(
    kind: str, name: str, entries: Mapping[str, _Entry], aliases: Mapping[str, str]
) -> _Entry:
    """Return one entry by its id or another name it is known by.

    Args:
        kind: What is looked up, for the message.
        name: Its id or alias.
        entries: By id.
        aliases: Other names to ids.

    Raises:
        UnknownNameError: With the nearest name.

    >>> find_entry("method", "mean", {"linear": 1}, {"mean": "linear"})
    1
    """
    name = aliases.get(name, name)
    if name not in entries:
        raise UnknownNameError(kind, name, [*entries, *aliases])
    return entries[name]
