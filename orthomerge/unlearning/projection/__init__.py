"""Retain projection: unlearning steps that leave protected losses where they are, to first order.

``RetainProjector`` serves any training loop; ``decompose`` and ``solve_cone`` are the pure algebra
behind it. Names are loaded on first use; importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthomerge.unlearning.projection.callback import RetainProjectionCallback
    from orthomerge.unlearning.projection.checking import Checkup, check_projection
    from orthomerge.unlearning.projection.cones import ConeInfo, solve_cone
    from orthomerge.unlearning.projection.decomposing import Decomposition, decompose
    from orthomerge.unlearning.projection.guarding import FiniteStep
    from orthomerge.unlearning.projection.memory import MemoryPlan, plan_memory
    from orthomerge.unlearning.projection.presets import PRESETS, preset
    from orthomerge.unlearning.projection.projector import RetainProjector
    from orthomerge.unlearning.projection.settings import ProjectionSettings
    from orthomerge.unlearning.projection.statistics import ProjectionStats

__all__ = [
    "PRESETS",
    "Checkup",
    "ConeInfo",
    "Decomposition",
    "FiniteStep",
    "MemoryPlan",
    "ProjectionSettings",
    "ProjectionStats",
    "RetainProjectionCallback",
    "RetainProjector",
    "check_projection",
    "decompose",
    "plan_memory",
    "preset",
    "solve_cone",
]

# No module may carry the name of something it exports: importing it would replace that.
_MODULES = {
    "callback": ("RetainProjectionCallback",),
    "checking": ("Checkup", "check_projection"),
    "cones": ("ConeInfo", "solve_cone"),
    "decomposing": ("Decomposition", "decompose"),
    "guarding": ("FiniteStep",),
    "memory": ("MemoryPlan", "plan_memory"),
    "presets": ("PRESETS", "preset"),
    "projector": ("RetainProjector",),
    "settings": ("ProjectionSettings",),
    "statistics": ("ProjectionStats",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
