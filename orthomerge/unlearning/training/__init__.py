"""Runs of unlearning: the trainer, when it stops, what it writes.

Names are loaded on first use; importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthomerge.unlearning.training.callbacks import StepReport
    from orthomerge.unlearning.training.doctor import check_run
    from orthomerge.unlearning.training.estimating import Estimate, estimate
    from orthomerge.unlearning.training.preparing import PreparedSets, prepare_sets
    from orthomerge.unlearning.training.running import (
        UnlearnResult,
        check_request_output,
        run_unlearning,
    )
    from orthomerge.unlearning.training.settings import (
        AdapterSettings,
        DataSettings,
        StopSettings,
        TrainSettings,
        UnlearnRequest,
    )
    from orthomerge.unlearning.training.stopping import Level, Reading, StopRule, Verdict
    from orthomerge.unlearning.training.tables import SetTable
    from orthomerge.unlearning.training.trainer import UnlearnTrainer

__all__ = [
    "AdapterSettings",
    "DataSettings",
    "Estimate",
    "Level",
    "PreparedSets",
    "Reading",
    "SetTable",
    "StepReport",
    "StopRule",
    "StopSettings",
    "TrainSettings",
    "UnlearnRequest",
    "UnlearnResult",
    "UnlearnTrainer",
    "Verdict",
    "check_request_output",
    "check_run",
    "estimate",
    "prepare_sets",
    "run_unlearning",
]

_MODULES = {
    "callbacks": ("StepReport",),
    "doctor": ("check_run",),
    "estimating": ("Estimate", "estimate"),
    "preparing": ("PreparedSets", "prepare_sets"),
    "running": ("UnlearnResult", "check_request_output", "run_unlearning"),
    "settings": (
        "AdapterSettings",
        "DataSettings",
        "StopSettings",
        "TrainSettings",
        "UnlearnRequest",
    ),
    "stopping": ("Level", "Reading", "StopRule", "Verdict"),
    "tables": ("SetTable",),
    "trainer": ("UnlearnTrainer",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
