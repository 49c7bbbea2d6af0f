"""The way out for low-rank factors: stored tensors and the config of a LoRA adapter PEFT loads.

DoRA's magnitudes, biases of B and whole tensors go along. Decides what is written, not how: tensors
go through the checkpoint writer.
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

__all__ = [
    "LoraBias",
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


def lora_key(
    module: str, factor: Literal["A", "B", "magnitude", "bias"], kind: LoraKind = "linear"
) -> str:
    """Return the name under which PEFT stores a factor, DoRA's magnitudes, or the bias of B.

    >>> lora_key("encoder.query", "A")
    'base_model.model.encoder.query.lora_A.weight'
    >>> lora_key("embed", "B", "embedding")
    'base_model.model.embed.lora_embedding_B'
    """
    if factor == "magnitude":
        leaf = "lora_magnitude_vector"
    elif factor == "bias":
        leaf = "lora_B.bias"
    else:
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
    magnitude: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the stored tensors of one module whose weight changes by B A.

    B [o, r], A [r, n], in the orientation of the base's own tensor, [o, c kh kw] of a convolution.
    With magnitudes the weight becomes ``m (W0 + B A) / ||W0 + B A||``, see ``dora_magnitudes``.

    Args:
        module: Module path in the base model.
        B: Left factor, scale folded in.
        A: Right factor.
        kind: "linear", "conv" or "embedding".
        kernel: Kernel size of a convolution.
        transposed: The layer stores its weight as [in, out], as ``Conv1D`` does.
        magnitude: DoRA's magnitudes, one per output feature; for all modules or for none.
        bias: What is added to the layer's bias; for all modules or for none.

    Raises:
        AdapterError: The shapes do not fit together, or PEFT has no such combination.

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
    features = B.shape[0]
    if kind == "conv":
        A = A.reshape(A.shape[0], -1, *kernel)
        B = B.reshape(*B.shape, *[1] * len(kernel))
    tensors = {lora_key(module, "A", kind): A, lora_key(module, "B", kind): B}
    if magnitude is not None:
        m = _vector(module, magnitude, features, "magnitude")
        # PEFT keeps a convolution's norms as they multiply its output.
        shape = (1, -1, *[1] * len(kernel)) if kind == "conv" else (-1,)
        tensors[lora_key(module, "magnitude", kind)] = m.reshape(shape)
    if bias is not None:
        if magnitude is not None or kind == "embedding":
            raise AdapterError(_NO_BIAS, tensor=module, remedy="Add it to the base's bias instead.")
        tensors[lora_key(module, "bias", kind)] = _vector(module, bias, features, "bias")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


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
    from torch.nn.functional import pad

    if B.shape[-1] != A.shape[-2] or B.shape[-1] > rank:
        raise AdapterError(
            f"these factors cannot be padded to rank {rank}",
            expected="B [..., o, r] and A [..., r, n] with r no larger",
            found=f"{list(B.shape)} and {list(A.shape)}",
            remedy="Truncate them, or choose a larger rank.",
        )
    more = rank - B.shape[-1]
    return pad(B, (0, more)), pad(A, (0, 0, 0, more))


def saved_key(name: str, adapted: Collection[str] = ()) -> str:
    """Return the name under which PEFT stores a whole tensor of the base model.

    Args:
        name: Its name in the base model.
        adapted: The modules with factors; their own tensors are one level deeper.

    >>> saved_key("score.weight", {"q"}), saved_key("q.bias", {"q"})
    ('base_model.model.score.weight', 'base_model.model.q.base_layer.bias')
    """
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in adapted else f"{PREFIX}{name}"


def saved_modules(
    names: Collection[str], adapted: Collection[str] = (), base_modules: Collection[str] = ()
) -> list[str]:
    """Return the ``modules_to_save`` for whole tensors of the base model.

    Single biases need no entry, only ``bias`` in ``lora_config``.

    Args:
        names: Names of the tensors in the base model.
        adapted: The modules with factors.
        base_modules: Paths of the base model's modules, where known.

    Raises:
        AdapterError: PEFT would save a further module, or one that is adapted, under this name.

    >>> saved_modules(["score.weight", "score.bias", "q.bias", "norm.bias"], {"q"})
    ['score']
    """
    found = sorted({module for name in names if (module := _saved_module(name, names, adapted))})
    for module in found:
        # PEFT compares the ends of paths, without regard to the dots.
        more = sorted(p for p in {*base_modules, *adapted} if p != module and p.endswith(module))
        if module in adapted or more:
            raise AdapterError(
                "is saved whole, and PEFT would save a further module under this name",
                tensor=module,
                found=module if module in adapted else more[0],
                remedy="Write full weights instead of an adapter.",
            )
    return found


def _saved_module(name: str, names: Collection[str], adapted: Collection[str]) -> str | None:
    module, _, leaf = name.rpartition(".")
    alone = leaf == "bias" and (module in adapted or f"{module}.weight" not in names)
    return None if alone else module


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
    if not ranks or min(ranks.values()) < 1:
        raise AdapterError(
            "a LoRA adapter needs modules of rank 1 or more",
            found=", ".join(f"{name}: {rank}" for name, rank in list(ranks.items())[:4]) or "none",
        )
    if dora and lora_bias:
        raise AdapterError(_NO_BIAS, remedy="Add the biases to the base's instead.")
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], -rank))
    # PEFT lets anything ending in a dot stand before a pattern; the anchor forbids it.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
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
