"""Unlearning objectives: what is minimised on the forget set, and what keeps the rest.

``get_objective(name).bind(...)`` gives an objective with its settings; ``reference_for`` keeps the
starting model for those that compare with it. Names are loaded on first use: listing objectives
does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthomerge.unlearning.objectives.bound import Components, Objective
    from orthomerge.unlearning.objectives.cached_scores import CachedScores
    from orthomerge.unlearning.objectives.reference import AdapterOff, FrozenCopy, Reference
    from orthomerge.unlearning.objectives.references import reference_for
    from orthomerge.unlearning.objectives.registry import (
        RETAIN_LOSSES,
        Need,
        ObjectiveInfo,
        all_objectives,
        get_objective,
        objective,
    )
    from orthomerge.unlearning.objectives.scores import (
        answer_rows,
        answer_tokens,
        row_mean,
        sequence_losses,
        token_losses,
        token_mean,
    )

__all__ = [
    "RETAIN_LOSSES",
    "AdapterOff",
    "CachedScores",
    "Components",
    "FrozenCopy",
    "Need",
    "Objective",
    "ObjectiveInfo",
    "Reference",
    "all_objectives",
    "answer_rows",
    "answer_tokens",
    "get_objective",
    "objective",
    "reference_for",
    "row_mean",
    "sequence_losses",
    "token_losses",
    "token_mean",
]

# No module may carry the name of something it exports: importing it would replace that.
_MODULES = {
    "bound": ("Components", "Objective"),
    "cached_scores": ("CachedScores",),
    "reference": ("AdapterOff", "FrozenCopy", "Reference"),
    "references": ("reference_for",),
    "registry": (
        "RETAIN_LOSSES",
        "Need",
        "ObjectiveInfo",
        "all_objectives",
        "get_objective",
        "objective",
    ),
    "scores": (
        "answer_rows",
        "answer_tokens",
        "row_mean",
        "sequence_losses",
        "token_losses",
        "token_mean",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
