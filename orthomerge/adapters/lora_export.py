"""The way out for low-rank factors: stored tensors and the config of a LoRA adapter PEFT loads.

Decides what is written, not how: tensors go through the checkpoint writer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from orthomerge.adapters.keys import PREFIX
from orthomerge.adapters.lora import LoraKind
from orthomerge.adapters.targets import exact_targets
from orthomerge.errors import AdapterError

if TYPE_CHECKING:
    import torch

__all__ = ["lora_config", "lora_key", "lora_tensors"]

# The version that introduced what is written: the config's meaning, not the installed package.
_VERSION = "0.18.0"
# Settings that say the same of every adapter that is written here.
_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "exclude_modules": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "use_dora": False,
    "use_rslora": False,
}


def lora_key(module: str, factor: Literal["A", "B"], kind: LoraKind = "linear") -> str:
    """Return the name under which PEFT stores a factor.

    >>> lora_key("encoder.query", "A")
    'base_model.model.encoder.query.lora_A.weight'
    >>> lora_key("embed", "B", "embedding")
    'base_model.model.embed.lora_embedding_B'
    """
    leaf = f"lora_embedding_{factor}" if kind == "embedding" else f"lora_{factor}.weight"
    return f"{PREFIX}{module}.{leaf}"


def lora_tensors(
    module: str,
    B: torch.Tensor,
    A: torch.Tensor,
    *,
    kind: LoraKind = "linear",
    kernel: tuple[int, ...] = (),
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the stored tensors of one module whose weight changes by B A.

    B [o, r], A [r, n], in the orientation of the base's own tensor, [o, c kh kw] of a convolution.

    Args:
        module: Module path in the base model.
        B: Left factor, scale folded in.
        A: Right factor.
        kind: "linear", "conv" or "embedding".
        kernel: Kernel size of a convolution.
        transposed: The layer stores its weight as [in, out], as ``Conv1D`` does.

    Raises:
        AdapterError: The factors' shapes do not fit together.

    >>> import torch
    >>> [tuple(t.shape) for t in lora_tensors("q", torch.ones(3, 1), torch.ones(1, 2)).values()]
    [(1, 2), (3, 1)]
    """
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or not B.shape[1]:
        raise AdapterError(
            "these are not two factors of one rank",
            tensor=module,
            expected="B [o, r] and A [r, n], r >= 1",
            found=f"{list(B.shape)} and {list(A.shape)}",
        )
    if transposed or kind == "embedding":
        B, A = A.mT, B.mT
    if kind == "conv":
        A = A.reshape(A.shape[0], -1, *kernel)
        B = B.reshape(*B.shape, *[1] * len(kernel))
    return {
        lora_key(module, "A", kind): A.contiguous(),
        lora_key(module, "B", kind): B.contiguous(),
    }


def lora_config(
    ranks: Mapping[str, int],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    modules_to_save: Collection[str] = (),
    base_modules: Collection[str] = (),
) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of a LoRA adapter with the scale folded into B.

    alpha = r everywhere, so that PEFT's scale is 1; the commonest rank is the config's own, every
    other one is written as a pattern that matches one path only.

    Args:
        ranks: Rank of each module, by module path.
        base_model: Name or path of the base model.
        revision: Of the base model.
        task_type: PEFT's, e.g. ``"CAUSAL_LM"``.
        fan_in_fan_out: Whether the layers store their weights transposed.
        modules_to_save: Modules whose whole tensors are in the adapter, too.
        base_modules: Paths of the base model's modules, where known: a target that also names
            another module is then written as a regular expression.

    Raises:
        AdapterError: There are no modules, or a rank is below 1.

    >>> config = lora_config({"a.q": 2, "a.k": 2, "a.v": 3})
    >>> config["r"], config["lora_alpha"], config["rank_pattern"]
    (2, 2, {'^a\\\\.v': 3})
    """
    if not ranks or min(ranks.values()) < 1:
        raise AdapterError(
            "a LoRA adapter needs modules of rank 1 or more",
            found=", ".join(f"{name}: {rank}" for name, rank in list(ranks.items())[:4]) or "none",
        )
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], -rank))
    # PEFT lets anything ending in a dot stand before a pattern; the anchor forbids it.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    return {
        **_FIXED,
        "alpha_pattern": pattern,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_alpha": usual,
        "modules_to_save": sorted(modules_to_save) or None,
        "peft_version": _VERSION,
        "r": usual,
        "rank_pattern": dict(pattern),
        "revision": revision,
        "target_modules": exact_targets(ranks, base_modules),
        "task_type": task_type,
    }
