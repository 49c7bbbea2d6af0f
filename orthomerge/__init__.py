"""Geometry-preserving model merging on safetensors checkpoints and PEFT adapters.

``merge``, ``merge_lora``, ``plan``, ``explain`` and ``unlearn`` are the doors for scripts;
``linalg`` holds the geometry. Names are loaded on first use: importing this package imports
neither torch nor transformers nor peft.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from orthomerge.version import __version__

if TYPE_CHECKING:
    from orthomerge import linalg
    from orthomerge.errors import OrthoMergeError
    from orthomerge.merging.registry import merge_method
    from orthomerge.merging.run import MergeResult
    from orthomerge.merging.spaces import Space
    from orthomerge.recipe.explaining import explain
    from orthomerge.recipe.lora import merge_lora
    from orthomerge.recipe.run import merge, plan
    from orthomerge.recipe.unlearning import unlearn

__all__ = [
    "MergeResult",
    "OrthoMergeError",
    "Space",
    "__version__",
    "explain",
    "linalg",
    "merge",
    "merge_lora",
    "merge_method",
    "plan",
    "unlearn",
]

_HOMES = {
    "MergeResult": "orthomerge.merging.run",
    "OrthoMergeError": "orthomerge.errors",
    "Space": "orthomerge.merging.spaces",
    "explain": "orthomerge.recipe.explaining",
    "merge": "orthomerge.recipe.run",
    "merge_lora": "orthomerge.recipe.lora",
    "merge_method": "orthomerge.merging.registry",
    "plan": "orthomerge.recipe.run",
    "unlearn": "orthomerge.recipe.unlearning",
}


def __getattr__(name: str) -> object:
    if name == "linalg":
        return importlib.import_module("orthomerge.linalg")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
