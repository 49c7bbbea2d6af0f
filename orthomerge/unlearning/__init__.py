"""Unlearning: remove what a forget set taught a model, and keep what a retain set shows.

Names are loaded on first use; importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthomerge.unlearning.data import load_rows, tokenise
    from orthomerge.unlearning.objectives import get_objective, objective
    from orthomerge.unlearning.projection import RetainProjectionCallback, RetainProjector
    from orthomerge.unlearning.training import UnlearnTrainer

__all__ = [
    "RetainProjectionCallback",
    "RetainProjector",
    "UnlearnTrainer",
    "get_objective",
    "load_rows",
    "objective",
    "tokenise",
]

_HOMES = {
    "RetainProjectionCallback": "orthomerge.unlearning.projection",
    "RetainProjector": "orthomerge.unlearning.projection",
    "UnlearnTrainer": "orthomerge.unlearning.training",
    "get_objective": "orthomerge.unlearning.objectives",
    "load_rows": "orthomerge.unlearning.data",
    "objective": "orthomerge.unlearning.objectives",
    "tokenise": "orthomerge.unlearning.data",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
