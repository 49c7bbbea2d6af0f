"""Turn a full fine-tune into adapters, and an adapter into the one that undoes it.

``extract`` and ``negate`` are the doors. Importing this room does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthomerge.extraction.layers import LayerReport
    from orthomerge.extraction.negating import NegateResult, negate
    from orthomerge.extraction.run import ExtractResult, extract

__all__ = ["ExtractResult", "LayerReport", "NegateResult", "extract", "negate"]

_HOMES = {
    "ExtractResult": "run",
    "LayerReport": "layers",
    "NegateResult": "negating",
    "extract": "run",
    "negate": "negating",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
