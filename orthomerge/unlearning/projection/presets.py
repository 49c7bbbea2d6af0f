"""Named settings: the default, a cheap one, and earlier methods that are special cases.

A preset is a dictionary of keyword arguments of ``RetainProjector``; what the caller must supply
besides (rows, a weight) is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from orthomerge.errors import UnknownNameError

__all__ = ["PRESETS", "preset"]

_PLAIN: Mapping[str, Any] = {"stage": "A", "granularity": "global", "restore": 0.0, "min_kept": 0.0}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Rows of the batch and a bank (set_bank), both stages; the defaults of ProjectionSettings.
        "gu": {},
        # No additional backward pass: past windows in place of the bank.
        "gu-cheap": {"rows": ("batch", "history"), "history": 8},
        # One row, one set of coefficients, gradients only: the rule as first published.
        "gu-rank-one": {**_PLAIN, "rows": ("batch",)},
        # PCGrad for the retain side: drop what conflicts, nothing else. arXiv:2001.06782
        "pcgrad": {**_PLAIN, "mode": "conflict", "rows": ("batch",)},
        # One half-space; the caller's update() gives the mean over the memory. arXiv:1812.00420
        "a-gem": {**_PLAIN, "mode": "conflict", "rows": ("batch",)},
        # One half-space per memory, given by add_rows, with GEM's margin. arXiv:1706.08840
        "gem": {**_PLAIN, "mode": "cone", "rows": ("extra",), "margin": 0.5},
        # Conflict-only with a smoothed retain gradient. arXiv:2503.09117
        "gru": {**_PLAIN, "mode": "conflict", "rows": ("batch",), "row_ema": 0.8},
        # Orthogonal to gradients of single retain samples (add_rows); project_ with retain_weight
        # alpha and forget_scale 1 - alpha. arXiv:2503.02312
        "orthograd": {**_PLAIN, "rows": ("extra",)},
        # Orthogonal to gradients of the model's outputs on past data (add_rows). arXiv:1910.07104
        "ogd": {**_PLAIN, "rows": ("extra",)},
        # Any of them with a Fisher diagonal (fisher=) as the metric of both stages.
        "fisher": {"metric": "fisher", "delta_metric": "fisher"},
        "off": {"stage": "A", "mode": "off"},
    }
)


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Return the settings of a preset, with changes on top.

    Args:
        name: One of ``PRESETS``.
        **changes: Settings that replace or join the preset's.

    Raises:
        UnknownNameError: There is no such preset.

    >>> preset("gu-cheap", history=4)["history"]
    4
    """
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return {**PRESETS[name], **changes}
