"""What merged LoRA adapters should change, dense and in fp64, from the stored files alone.

numpy formulas; neither orthomerge nor PEFT computes anything here. Pinned against values worked out
by hand in tests/parity/test_peft_defects.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

__all__ = [
    "Array",
    "Changes",
    "apart",
    "changes",
    "elected",
    "in_knots",
    "pruned",
    "rank_limited",
    "weighted_mean",
    "weighted_sum",
]

Array = npt.NDArray[np.float64]
Changes = dict[str, Array]  # of a base's tensors, by name
_PREFIX = "base_model.model."


def changes(folder: Path, base: Mapping[str, Array]) -> Changes:
    """Return what an adapter of linear layers changes in its base.

    ``s B A`` with s = alpha / r or alpha / sqrt(r); with DoRA's magnitudes m the weight becomes
    ``m (W0 + s B A) / ||rows||``; a bias of B changes the layer's by ``s b``; whole tensors replace
    the base's.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = {
        key.removeprefix(_PREFIX): value.double().numpy()
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    found: Changes = {}
    for key in [key for key in stored if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        A, B = stored.pop(key), stored.pop(f"{name}.lora_B.weight")
        scale = _scale(config, name, A.shape[0])
        found[f"{name}.weight"] = scale * B @ A
        if (bias := stored.pop(f"{name}.lora_B.bias", None)) is not None:
            found[f"{name}.bias"] = scale * bias
        if (m := stored.pop(f"{name}.lora_magnitude_vector", None)) is not None:
            W0 = base[f"{name}.weight"]
            V = W0 + found[f"{name}.weight"]
            found[f"{name}.weight"] = (m / np.linalg.norm(V, axis=1))[:, None] * V - W0
    return found | {name: value - base[name] for name, value in stored.items()}


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    hits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(hits, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def weighted_sum(items: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return ``Σ w_i x_i``."""
    return np.asarray(sum(w * x for w, x in zip(weights, items, strict=True)))


def weighted_mean(items: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return ``Σ w_i x_i / Σ w_i``."""
    return weighted_sum(items, weights) / sum(weights)


def pruned(density: float) -> Callable[[Sequence[Array], Sequence[float]], Array]:
    """Return the sum of each item's ⌊density · numel⌋ largest entries, 1 at least."""

    def merge(items: Sequence[Array], weights: Sequence[float]) -> Array:
        return weighted_sum([_largest(x, density) for x in items], weights)

    return merge


def elected(density: float) -> Callable[[Sequence[Array], Sequence[float]], Array]:
    """Return TIES: the sign of ``Σ w_i t_i`` (0 as +), the mean by ``|w_i|`` of what agrees."""

    def merge(items: Sequence[Array], weights: Sequence[float]) -> Array:
        voted = [w * _largest(x, density) for w, x in zip(weights, items, strict=True)]
        sign = np.where(sum(voted) >= 0, 1.0, -1.0)
        agree = [(v * sign > 0) for v in voted]
        divisor = sum(abs(w) * a for w, a in zip(weights, agree, strict=True))
        total = sum(v * a for v, a in zip(voted, agree, strict=True))
        return np.asarray(total / np.where(divisor > 0, divisor, 1.0))

    return merge


def in_knots(
    merge: Callable[[Sequence[Array], Sequence[float]], Array],
) -> Callable[[Sequence[Array], Sequence[float]], Array]:
    """Return the same merge in KnOTS coordinates: ``[x_1 | … | x_N] = U [Z_1 | … | Z_N]``.

    Z = S V^T, directions below 1e-6 of the largest left out.
    """

    def lifted(items: Sequence[Array], weights: Sequence[float]) -> Array:
        U, S, Vt = np.linalg.svd(np.concatenate(items, axis=1), full_matrices=False)
        keep = 1e-6 * S[0] < S
        Z = (S[:, None] * Vt)[keep]
        parts = np.split(Z, len(items), axis=1)
        return np.asarray(U[:, keep] @ merge(parts, weights))

    return lifted


def rank_limited(
    rank: int, merge: Callable[[Sequence[Array], Sequence[float]], Array] = weighted_sum
) -> Callable[[Sequence[Array], Sequence[float]], Array]:
    """Return the best approximation of a merge by a matrix of this rank."""

    def limited(items: Sequence[Array], weights: Sequence[float]) -> Array:
        U, S, Vt = np.linalg.svd(merge(items, weights), full_matrices=False)
        return np.asarray((U[:, :rank] * S[:rank]) @ Vt[:rank])

    return limited


def _largest(x: Array, density: float) -> Array:
    count = max(1, math.floor(density * x.size + 1e-9))
    return np.where(np.abs(x) >= np.sort(np.abs(x), axis=None)[-count], x, 0.0)


def apart(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """Return the largest relative error of any tensor, in the Frobenius norm.

    A tensor that should not change is compared with the largest change.
    """
    largest = max(float(np.linalg.norm(x)) for x in wanted.values())
    zero = np.zeros(1)
    errors = []
    for name in {*found, *wanted}:
        error = np.linalg.norm(found.get(name, zero) - wanted.get(name, zero))
        errors.append(float(error) / (float(np.linalg.norm(wanted.get(name, zero))) or largest))
    return float(np.max(errors))  # NaN if any is
