"""What the presets of do-merging decide for parameters that are left null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS", "resolved_preset"]

# The paper gives neither γ, nor the solver's settings, nor the strength: what stands here for
# `paper` is inferred from its text, and its scale is to be tuned.
PRESETS: dict[str, dict[str, Any]] = {
    "robust": {
        "orthogonalise": "lowdin",
        "target": "auto",
        "strength": 1.0,
        "gamma": 10.0,
        "gauge": "balanced",
        "normalise": True,
        "steps": 200,
        "tolerance": 1e-6,
        "decouple_strength": 0.0,
        "axis": "in",
        "magnitude": "mean",
        "magnitude_source": "original",
        "zero_columns": "exclude",
        "cap": 10.0,
        "renormalise": False,
        "scale": 1.0,
    },
    "paper": {
        "orthogonalise": "gd",
        "target": "both",
        "strength": 1.0,
        "gamma": 1.0,
        "gauge": "stored",
        "normalise": False,
        "steps": 100,
        "tolerance": 1e-6,
        "decouple_strength": 1.0,
        "axis": "in",
        "magnitude": "mean",
        "magnitude_source": "orth",
        "zero_columns": "include",
        "cap": math.inf,
        "renormalise": False,
        "scale": 1.0,
    },
}


def resolved_preset(parameters: Mapping[str, Any], models: int) -> dict[str, Any]:
    """Return the parameters with what the preset decides; values by rules stay as they are.

    Args:
        parameters: As given, null where the preset decides.
        models: Number of models; the presets do not depend on it.
    """
    preset = parameters["preset"]
    decided = PRESETS[preset] if isinstance(preset, str) else {}
    return {key: decided.get(key) if v is None else v for key, v in parameters.items()}
