"""Byte sizes as people write them: ``5GB``, ``512MiB``, ``1_000_000``."""

from __future__ import annotations

import re

from orthomerge.errors import RecipeError

__all__ = ["format_size", "parse_size"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str | int) -> int:
    """Return a number of bytes.

    Raises:
        RecipeError: It is no size, or not positive.

    >>> parse_size("1.5GB"), parse_size("2MiB")
    (1500000000, 2097152)
    """
    match = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = match and _UNITS.get(match[2].lower())
    size = int(float(match[1].replace("_", "")) * unit) if match and unit else 0
    if size <= 0:
        raise RecipeError(f"'{text}' is not a size", remedy="Write it like 5GB or 512MiB.")
    return size


def format_size(nbytes: float) -> str:
    """Return a size for people, in decimal units.

    >>> format_size(748_000_000)
    '748.0 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
