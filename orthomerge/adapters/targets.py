"""Which ``target_modules`` make PEFT adapt given modules and no others.

Names only; PEFT matches the entries of a list as suffixes, a string as a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

__all__ = ["exact_targets", "matched_modules"]


def exact_targets(modules: Collection[str], base_modules: Collection[str] = ()) -> list[str] | str:
    """Return targets that match exactly the given module paths.

    Args:
        modules: Full paths.
        base_modules: All modules of the base, where known: a path that ends another one's is then
            written as an expression.

    >>> exact_targets(["a.q", "a.k"])
    ['a.k', 'a.q']
    >>> exact_targets(["a.q"], ["a.q", "b.a.q"])
    'a\\\\.q'
    """
    paths = sorted(modules)
    if matched_modules(paths, base_modules) <= set(modules):
        return paths
    return "|".join(re.escape(path) for path in paths)


def matched_modules(names: Iterable[str], base_modules: Collection[str]) -> set[str]:
    """Return the modules that PEFT's list matching would pick.

    >>> sorted(matched_modules(["q"], ["a.q", "a.kq", "q"]))
    ['a.q', 'q']
    """
    exact = set(names)
    suffixes = tuple(f".{name}" for name in exact)
    return {path for path in base_modules if path in exact or path.endswith(suffixes)}
