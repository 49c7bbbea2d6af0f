"""Pure batched functions on ``(..., m, n)`` tensors: skew matrices, rotations, blocks, means.

No files, no logging, no settings: tensors in, tensors out. Names are loaded on first use, because
``triangular`` serves the planner, which must not pay for importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthomerge.linalg.blocks import align_blocks, regroup_blocks, rotate_columns
    from orthomerge.linalg.checks import frobenius, orthogonality, require_finite, skewness
    from orthomerge.linalg.means import AlgebraMerge, Correction, merge_algebra
    from orthomerge.linalg.polar_factors import PolarMethod, PolarReport, polar_factor
    from orthomerge.linalg.precision import full_precision
    from orthomerge.linalg.procrustes_anchors import automatic_anchor, residual_noise_baseline
    from orthomerge.linalg.procrustes_fits import ProcrustesFit, procrustes_right
    from orthomerge.linalg.procrustes_frames import ProcrustesBase
    from orthomerge.linalg.rotations import apply_cayley, cayley, cayley_neumann, inverse_cayley
    from orthomerge.linalg.skew import pack_skew, unpack_skew
    from orthomerge.linalg.triangular import block_size, packed_width

__all__ = [
    "AlgebraMerge",
    "Correction",
    "PolarMethod",
    "PolarReport",
    "ProcrustesBase",
    "ProcrustesFit",
    "align_blocks",
    "apply_cayley",
    "automatic_anchor",
    "block_size",
    "cayley",
    "cayley_neumann",
    "frobenius",
    "full_precision",
    "inverse_cayley",
    "merge_algebra",
    "orthogonality",
    "pack_skew",
    "packed_width",
    "polar_factor",
    "procrustes_right",
    "regroup_blocks",
    "require_finite",
    "residual_noise_baseline",
    "rotate_columns",
    "skewness",
    "unpack_skew",
]

# No module may carry the name of a function it exports: importing it would replace the function.
_MODULES = {
    "blocks": ("align_blocks", "regroup_blocks", "rotate_columns"),
    "checks": ("frobenius", "orthogonality", "require_finite", "skewness"),
    "means": ("AlgebraMerge", "Correction", "merge_algebra"),
    "polar_factors": ("PolarMethod", "PolarReport", "polar_factor"),
    "precision": ("full_precision",),
    "procrustes_anchors": ("automatic_anchor", "residual_noise_baseline"),
    "procrustes_fits": ("ProcrustesFit", "procrustes_right"),
    "procrustes_frames": ("ProcrustesBase",),
    "rotations": ("apply_cayley", "cayley", "cayley_neumann", "inverse_cayley"),
    "skew": ("pack_skew", "unpack_skew"),
    "triangular": ("block_size", "packed_width"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
