"""The way out for low-rank factors: stored tensors and the config of a LoRA adapter PEFT loads.

DoRA's magnitudes, biases of B and whole tensors go along. Decides what is written, not how: tensors
go through the checkpoint writer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from orthomerge.adapters.lora import LoraKind
from orthomerge.adapters.lora_keys import check_module_name, lora_key, saved_key, saved_modules
from orthomerge.adapters.lora_styles import ADAPTER_METADATA, LoraPart, LoraStyle
from orthomerge.adapters.targets import exact_targets
from orthomerge.errors import AdapterError

if TYPE_CHECKING:
    import torch

__all__ = [
    "LoraBias",
    "diffusers_metadata",
    "lora_config",
    "lora_key",
    "lora_tensors",
    "padded_factors",
    "saved_key",
    "saved_modules",
]

LoraBias = Literal["none", "all", "lora_only"]

# The version that introduced what is written: the config's meaning, not the installed package.
_VERSION = "0.18.0"
# Settings that say the same of every adapter that is written here.
_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "exclude_modules": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_dropout": 0.0,
    "use_rslora": False,
}


# What PEFT's config cannot combine.
_NO_BIAS = "PEFT has no biases of B beside magnitudes, and none for embeddings"


def lora_tensors(
    module: str,
    B: torch.Tensor,
    A: torch.Tensor,
    *,
    kind: LoraKind = "linear",
    kernel: tuple[int, ...] = (),
    transposed: bool = False,
    magnitude: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    style: LoraStyle = "peft",
) -> dict[str, torch.Tensor]:
    """Return the stored tensors of one module whose weight changes by B A.

    B [o, r], A [r, n], in the orientation of the base's own tensor, [o, c kh kw] of a convolution.
    With magnitudes the weight becomes ``m (W0 + B A) / ||W0 + B A||``, see ``dora_magnitudes``.
    Kohya's format gets alpha = r, a scale of 1; diffusers' has that scale without saying so. Its
    releases up to 0.39 nevertheless scale by something else where ranks differ: write
    ``diffusers_metadata`` too, or factors padded to one rank.

    Args:
        module: Module name as the format writes it.
        B: Left factor, scale folded in.
        A: Right factor.
        kind: "linear", "conv" or "embedding".
        kernel: Kernel size of a convolution.
        transposed: The layer stores its weight as [in, out], as ``Conv1D`` does.
        magnitude: DoRA's magnitudes, one per output feature; for all modules or for none.
        bias: What is added to the layer's bias; for all modules or for none.
        style: The format.

    Raises:
        AdapterError: The shapes do not fit together, or the format has no such combination.

    >>> import torch
    >>> [tuple(t.shape) for t in lora_tensors("q", torch.ones(3, 1), torch.ones(1, 2)).values()]
    [(1, 2), (3, 1)]
    """
    _check_parts(module, B, A, magnitude, bias, kind)
    if transposed or kind == "embedding":
        B, A = A.mT, B.mT
    features, rank = B.shape
    if kind == "conv":
        A = A.reshape(rank, -1, *kernel)
        B = B.reshape(features, rank, *[1] * len(kernel))
    parts: dict[LoraPart, torch.Tensor] = {"A": A, "B": B}
    if magnitude is not None:
        m = _vector(module, magnitude, features, "magnitude")
        # PEFT keeps a convolution's norms as they multiply its output.
        parts["magnitude"] = m.reshape(1, -1, *[1] * len(kernel)) if kind == "conv" else m
    if bias is not None:
        parts["bias"] = _vector(module, bias, features, "bias")
    if style == "kohya":  # float32 even beside half precision, which has not every integer
        parts["alpha"] = A.new_tensor(float(rank), dtype=_float32())
    return {
        lora_key(module, part, kind, style=style): value.contiguous()
        for part, value in parts.items()
    }


def diffusers_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
    """Return the ``__metadata__`` in which diffusers keeps the ranks and scales of a LoRA file.

    Args:
        ranks: Rank of each module, by its name in diffusers' format.

    Raises:
        AdapterError: A name says no component, or there are no modules.

    >>> import json
    >>> entry = json.loads(diffusers_metadata({"unet.mid_block.to_q": 2})["lora_adapter_metadata"])
    >>> entry["unet.r"], entry["unet.lora_alpha"]
    (2, 2)
    """
    split: dict[str, dict[str, int]] = {}
    for module, rank in ranks.items():
        check_module_name(module, "diffusers")
        component, _, path = module.partition(".")
        split.setdefault(component, {})[path] = rank
    values = {
        f"{component}.{key}": value
        for component, own in split.items()
        for key, value in lora_config(own).items()
    }
    return {"format": "pt", ADAPTER_METADATA: json.dumps(values, sort_keys=True)}


def padded_factors(
    B: torch.Tensor, A: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors with zeros added up to a rank; the product stays what it is.

    B [..., o, r], A [..., r, n] -> [..., o, rank], [..., rank, n]. For servers that hold all
    adapters and modules in buffers of one rank.

    Raises:
        AdapterError: The factors' rank is larger, or they have two.

    >>> import torch
    >>> B, A = padded_factors(torch.ones(3, 1), torch.ones(1, 2), 4)
    >>> tuple(B.shape), tuple(A.shape), float((B @ A).sum())
    ((3, 4), (4, 2), 6.0)
    """
    from orthomerge.linalg.factors import Factors

    if B.shape[-1] != A.shape[-2] or B.shape[-1] > rank:
        raise AdapterError(
            f"these factors cannot be padded to rank {rank}",
            expected="B [..., o, r] and A [..., r, n] with r no larger",
            found=f"{list(B.shape)} and {list(A.shape)}",
            remedy="Truncate them, or choose a larger rank.",
        )
    padded = Factors(B, A).padded(rank)
    return padded.B, padded.A


def _check_parts(
    module: str,
    B: torch.Tensor,
    A: torch.Tensor,
    magnitude: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: LoraKind,
) -> None:
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or not B.shape[1]:
        raise AdapterError(
            "these are not two factors of one rank",
            tensor=module,
            expected="B [o, r] and A [r, n], r >= 1",
            found=f"{list(B.shape)} and {list(A.shape)}",
        )
    if bias is not None and (magnitude is not None or kind == "embedding"):
        raise AdapterError(_NO_BIAS, tensor=module, remedy="Add it to the base's bias instead.")


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def _vector(module: str, values: torch.Tensor, features: int, what: str) -> torch.Tensor:
    if values.numel() != features:
        raise AdapterError(
            f"is not one {what} per output feature",
            tensor=module,
            expected=features,
            found=list(values.shape),
        )
    return values.reshape(-1)


def lora_config(
    ranks: Mapping[str, int],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    modules_to_save: Collection[str] = (),
    base_modules: Collection[str] = (),
    dora: bool = False,
    lora_bias: bool = False,
    bias: LoraBias = "none",
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
        modules_to_save: Modules whose whole tensors are in the adapter, see ``saved_modules``.
        base_modules: Paths of the base model's modules, where known: a target that also names
            another module is then written as a regular expression.
        dora: Every module has magnitudes.
        lora_bias: Every module has a bias of B.
        bias: Which of the base's own biases are in the adapter.

    Raises:
        AdapterError: There are no modules, a rank is below 1, or PEFT has no such combination.

    >>> config = lora_config({"a.q": 2, "a.k": 2, "a.v": 3})
    >>> config["r"], config["lora_alpha"], config["rank_pattern"]
    (2, 2, {'^a\\\\.v': 3})
    """
    _check_ranks(ranks)
    if dora and lora_bias:
        raise AdapterError(_NO_BIAS, remedy="Add the biases to the base's instead.")
    usual, pattern = _rank_pattern(ranks)
    return {
        **_FIXED,
        "alpha_pattern": pattern,
        "base_model_name_or_path": base_model,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_alpha": usual,
        "lora_bias": lora_bias,
        "modules_to_save": sorted(modules_to_save) or None,
        "peft_version": _VERSION,
        "r": usual,
        "rank_pattern": dict(pattern),
        "revision": revision,
        "target_modules": exact_targets(ranks, base_modules),
        "task_type": task_type,
        "use_dora": dora,
    }


def _check_ranks(ranks: Mapping[str, int]) -> None:
    if not ranks or min(ranks.values()) < 1:
        raise AdapterError(
            "a LoRA adapter needs modules of rank 1 or more",
            found=", ".join(f"{name}: {rank}" for name, rank in list(ranks.items())[:4]) or "none",
        )


def _rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return the commonest rank, and the others as patterns that match one path each."""
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], -rank))
    # PEFT lets anything ending in a dot stand before a pattern; the anchor forbids it.
    return usual, {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
