"""Pure batched functions on ``(..., m, n)`` tensors: skew matrices, rotations, blocks, means.

No files, no logging, no settings: tensors in, tensors out. Names are loaded on first use, because
``triangular`` serves the planner, which must not pay for importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthomerge.linalg.aligned_means import ProcrustesMeanReport, procrustes_mean
    from orthomerge.linalg.blocks import align_blocks, regroup_blocks, rotate_columns
    from orthomerge.linalg.checks import frobenius, orthogonality, require_finite, skewness
    from orthomerge.linalg.devices import require_device
    from orthomerge.linalg.energy import EnergyReport, hyperspherical_energy
    from orthomerge.linalg.factors import (
        Factors,
        balanced,
        balancing,
        concatenated,
        gram,
        singular_values,
        truncated,
    )
    from orthomerge.linalg.logarithms import (
        cayley_angles,
        cayley_from_log,
        exp_so,
        log_from_cayley,
        log_so,
        rotation_angles,
    )
    from orthomerge.linalg.lowrank import leading_directions, orthonormal_frame
    from orthomerge.linalg.means import AlgebraMerge, AlgebraSum, Correction, merge_algebra
    from orthomerge.linalg.orthogonal_stacks import (
        StackSolver,
        StackTransform,
        Whitened,
        mean_principal_cosine,
        orthogonalise_stack,
        stack_overlap,
        whitened_stack,
    )
    from orthomerge.linalg.planes import PlanesReport, merge_planes, plane_count
    from orthomerge.linalg.polar_factors import PolarMethod, PolarReport, polar_factor
    from orthomerge.linalg.precision import full_precision
    from orthomerge.linalg.procrustes_anchors import (
        automatic_anchor,
        residual_noise_baseline,
        rotational_limit,
    )
    from orthomerge.linalg.procrustes_fits import ProcrustesFit, procrustes_right
    from orthomerge.linalg.procrustes_frames import ProcrustesBase
    from orthomerge.linalg.rotation_means import KarcherReport, karcher_mean
    from orthomerge.linalg.rotations import apply_cayley, cayley, cayley_neumann, inverse_cayley
    from orthomerge.linalg.skew import pack_skew, unpack_skew
    from orthomerge.linalg.stack_descent import adam_stack
    from orthomerge.linalg.triangular import block_size, packed_width
    from orthomerge.linalg.truncation import Truncation, truncated_svd

__all__ = [
    "AlgebraMerge",
    "AlgebraSum",
    "Correction",
    "EnergyReport",
    "Factors",
    "KarcherReport",
    "PlanesReport",
    "PolarMethod",
    "PolarReport",
    "ProcrustesBase",
    "ProcrustesFit",
    "ProcrustesMeanReport",
    "StackSolver",
    "StackTransform",
    "Truncation",
    "Whitened",
    "adam_stack",
    "align_blocks",
    "apply_cayley",
    "automatic_anchor",
    "balanced",
    "balancing",
    "block_size",
    "cayley",
    "cayley_angles",
    "cayley_from_log",
    "cayley_neumann",
    "concatenated",
    "exp_so",
    "frobenius",
    "full_precision",
    "gram",
    "hyperspherical_energy",
    "inverse_cayley",
    "karcher_mean",
    "leading_directions",
    "log_from_cayley",
    "log_so",
    "mean_principal_cosine",
    "merge_algebra",
    "merge_planes",
    "orthogonalise_stack",
    "orthogonality",
    "orthonormal_frame",
    "pack_skew",
    "packed_width",
    "plane_count",
    "polar_factor",
    "procrustes_mean",
    "procrustes_right",
    "regroup_blocks",
    "require_device",
    "require_finite",
    "residual_noise_baseline",
    "rotate_columns",
    "rotation_angles",
    "rotational_limit",
    "singular_values",
    "skewness",
    "stack_overlap",
    "truncated",
    "truncated_svd",
    "unpack_skew",
    "whitened_stack",
]

# No module may carry the name of a function it exports: importing it would replace the function.
_MODULES = {
    "aligned_means": (
        "ProcrustesMeanReport",
        "procrustes_mean",
    ),
    "blocks": (
        "align_blocks",
        "regroup_blocks",
        "rotate_columns",
    ),
    "checks": (
        "frobenius",
        "orthogonality",
        "require_finite",
        "skewness",
    ),
    "devices": ("require_device",),
    "energy": (
        "EnergyReport",
        "hyperspherical_energy",
    ),
    "factors": (
        "Factors",
        "balanced",
        "balancing",
        "concatenated",
        "gram",
        "singular_values",
        "truncated",
        "truncated_with_values",
    ),
    "logarithms": (
        "cayley_angles",
        "cayley_from_log",
        "exp_so",
        "log_from_cayley",
        "log_so",
        "rotation_angles",
    ),
    "lowrank": (
        "leading_directions",
        "orthonormal_frame",
    ),
    "means": (
        "AlgebraMerge",
        "AlgebraSum",
        "Correction",
        "merge_algebra",
    ),
    "orthogonal_stacks": (
        "StackSolver",
        "StackTransform",
        "Whitened",
        "mean_principal_cosine",
        "orthogonalise_stack",
        "stack_overlap",
        "whitened_stack",
    ),
    "planes": (
        "PlanesReport",
        "merge_planes",
        "plane_count",
    ),
    "polar_factors": (
        "PolarMethod",
        "PolarReport",
        "polar_factor",
    ),
    "precision": ("full_precision",),
    "procrustes_anchors": ("automatic_anchor", "residual_noise_baseline", "rotational_limit"),
    "procrustes_fits": ("ProcrustesFit", "procrustes_right"),
    "procrustes_frames": ("ProcrustesBase",),
    "rotation_means": (
        "KarcherReport",
        "karcher_mean",
    ),
    "rotations": (
        "apply_cayley",
        "cayley",
        "cayley_neumann",
        "inverse_cayley",
    ),
    "sketching": ("sketch",),
    "skew": (
        "pack_skew",
        "unpack_skew",
    ),
    "stack_descent": ("adam_stack",),
    "truncation": ("Truncation", "truncated_svd"),
    "triangular": (
        "block_size",
        "packed_width",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
