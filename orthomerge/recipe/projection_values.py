"""Read a projection's settings from a recipe's plain values; what they mean is known elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from orthomerge.errors import OrthoMergeError, RecipeError, UnknownNameError, combined
from orthomerge.unlearning.projection import PRESETS, ProjectionSettings, preset

__all__ = ["projection_settings"]

_BANK_ROWS = 256
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_OPTIONAL = {"row_ema", "rtol", "clip_value"}  # numbers, or null


def projection_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any] | None, int]:
    """Return the projector's settings, None for none, and how many rows its bank covers.

    Args:
        given: ``preset``, and any setting of ``ProjectionSettings``, ``scope`` or ``bank_rows``.

    Raises:
        OrthoMergeError: With everything that is wrong.

    >>> projection_settings({"preset": "gu-cheap", "history": 4})[0]["history"]
    4
    """
    changes = dict(given)
    name = changes.pop("preset")
    bank_rows = changes.pop("bank_rows", _BANK_ROWS)
    if name not in PRESETS:
        raise UnknownNameError("projection", str(name), PRESETS)
    problems = [] if _is_count(bank_rows) else [_wrong("bank_rows", bank_rows, "a number ≥ 1")]
    values, wrong = _read(changes)
    problems += wrong
    if not problems:
        settings = preset(name, **values)
        try:
            ProjectionSettings(**{k: v for k, v in settings.items() if k != "scope"})
        except OrthoMergeError as error:
            problems.append(error)
    if problems:
        raise combined(problems)
    return (None, 0) if name == "off" else (settings, bank_rows)


def _read(changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[OrthoMergeError]]:
    """Return the values in their own types, and what is wrong with them."""
    defaults = {field.name: field.default for field in fields(ProjectionSettings)}
    known = {**defaults, "scope": ""}
    values, problems = {}, []
    for name, value in changes.items():
        if name not in known:
            names = {*known, "bank_rows"}
            problems.append(UnknownNameError("setting of the projection", name, names))
        elif (expected := _expected(name, value, known[name])) is not None:
            problems.append(_wrong(name, value, expected))
        else:
            values[name] = _dtype(value) if name == "row_dtype" else value
    return values, problems


def _expected(name: str, value: Any, default: Any) -> str | None:
    """Return what a value should have been, None where it is that."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    words = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
    if name == "row_dtype":
        return None if value in _DTYPES else " | ".join(_DTYPES)
    if name in _OPTIONAL:
        return None if number or value is None else "a number or null"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if number and isinstance(value, int) else "a whole number"
    if isinstance(default, float):
        return None if number else "a number"
    if isinstance(default, tuple):
        return None if words else "a list of words"
    allowed = isinstance(value, str) or (name == "granularity" and words)
    return None if allowed else "a word"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _wrong(name: str, value: Any, expected: str) -> RecipeError:
    return RecipeError(f"projection.{name}", expected=expected, found=repr(value))


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
