"""Compare a merged LoRA adapter with the fp64 sum of its inputs, on a few modules.

Reads the files as PEFT does and shares no code with what wrote them. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

__all__ = ["errors", "main"]

_MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj")


def errors(inputs: list[Path], output: Path) -> dict[str, dict[str, float]]:
    """Return per module the distance from the truths, relative to each truth's norm.

    ``sum`` is ``Σ s_i B_i A_i / N``, ``truncated`` its best approximation of the adapters' rank.
    """
    found = {}
    for module in _MODULES:
        parts = [_factors(folder, module) for folder in inputs]
        B = np.concatenate([B / len(parts) for B, _ in parts], axis=1)
        A = np.concatenate([A for _, A in parts], axis=0)
        left, right = _factors(output, module)
        total, rank = B @ A, len(parts[0][1])
        Q, R = np.linalg.qr(B)
        P, L = np.linalg.qr(A.T)
        U, S, Vt = np.linalg.svd(R @ L.T)
        cut = ((Q @ U[:, :rank]) * S[:rank]) @ (Vt[:rank] @ P.T)
        merged = left @ right
        found[module] = {"sum": _distance(merged, total), "truncated": _distance(merged, cut)}
    return found


def _distance(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def _factors(folder: Path, module: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return B with its scale and A, in fp64."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        A, B = (
            file.get_tensor(f"base_model.model.{module}.lora_{part}.weight").astype(np.float64)
            for part in "AB"
        )
    rank, alpha = len(A), config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches them
            alpha = value
    return B * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)), A


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path, nargs="+", help="adapter folders")
    parser.add_argument("--output", type=Path, required=True, help="the merged adapter")
    options = parser.parse_args()
    print(json.dumps(errors(options.inputs, options.output)))


if __name__ == "__main__":
    main()
