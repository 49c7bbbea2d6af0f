"""Write JSON that every reader accepts: no infinities, no NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["json_text"]


def json_text(content: Any, *, indent: int | None = 2) -> str:
    """Return content as JSON; numbers that are not finite become text, unknown objects too.

    >>> json_text({"c_max": float("inf")}, indent=None)
    '{"c_max": "inf"}'
    """
    plain = _plain(content)
    return json.dumps(plain, indent=indent, ensure_ascii=False, default=str, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
