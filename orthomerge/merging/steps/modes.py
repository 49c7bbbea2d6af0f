"""What the modes of the decoupled merge decide for parameters that are left null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orthomerge.merging.nesting import nested_method

__all__ = ["mode_defaults", "resolved"]

_ANCHORS = {"robust": 1e-3, "faithful": 1e-6, "reproduce": 0.0}


def mode_defaults(mode: str, models: int) -> dict[str, Any]:
    """Return anchor, gate, c_max and residual of a mode, for a number of models."""
    robust = mode == "robust"
    mean = {"method": "task-arithmetic", "normalize": True}
    return {
        "anchor": _ANCHORS[mode],
        "gate": "auto" if robust else "off",
        "c_max": 3 * math.sqrt(models) if robust else math.inf,
        "residual": nested_method("residual", {"method": "tsv-m"} if robust else mean),
    }


def resolved(parameters: Mapping[str, Any], models: int) -> dict[str, Any]:
    """Return the parameters with what the mode decides; values by rules stay as they are."""
    mode = parameters["mode"]
    decided = mode_defaults(mode, models) if isinstance(mode, str) else {}
    return {key: decided.get(key) if v is None else v for key, v in parameters.items()}
