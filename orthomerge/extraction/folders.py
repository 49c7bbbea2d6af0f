"""Lay factors out as adapter folders that PEFT loads; nothing is written here."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from orthomerge.adapters import (
    CONFIG_NAME,
    EXACT,
    MergedModule,
    lora_config,
    lora_tensors,
    oft_config,
    oft_key,
    stored_from_canonical,
)
from orthomerge.checkpoints.bundle import Bundle
from orthomerge.extraction.plan import Layer

if TYPE_CHECKING:
    import torch

    from orthomerge.extraction.layers import LayerFactors

__all__ = ["ADAPTER_NAME", "Adapter", "adapter_bundle", "lora_adapter", "oft_adapter"]

#: PEFT's name of an adapter's tensor file.
ADAPTER_NAME = "adapter_model.safetensors"

Adapter = tuple[dict[str, "torch.Tensor"], dict[str, Any]]


def oft_adapter(
    factors: Mapping[Layer, LayerFactors],
    base_model: str | None,
    task_type: str | None,
    base_modules: Collection[str],
) -> Adapter | None:
    """Return tensors and config of the rotations; None if there are none."""
    found = {v: f.generator for v, f in factors.items() if f.generator is not None}
    if not found:
        return None
    tensors = {
        oft_key(layer.module, "linear"): stored_from_canonical(A, "linear", EXACT).contiguous()
        for layer, A in found.items()
    }
    modules = {v.module: MergedModule(v.columns, v.block_size) for v in found}
    config = oft_config(
        modules, base_model=base_model, task_type=task_type, base_modules=base_modules
    )
    return tensors, config


def lora_adapter(
    factors: Mapping[Layer, LayerFactors],
    base_model: str | None,
    task_type: str | None,
    base_modules: Collection[str],
) -> Adapter | None:
    """Return tensors and config of the low-rank parts; None if there are none."""
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, f in factors.items():
        if f.B is not None and f.A is not None:
            # B A is [o, n] whatever the file's orientation, which is how PEFT stores it.
            tensors |= lora_tensors(layer.module, f.B, f.A)
            ranks[layer.module] = f.B.shape[1]
    if not ranks:
        return None
    config = lora_config(
        ranks,
        base_model=base_model,
        task_type=task_type,
        fan_in_fan_out=any(layer.transposed for layer in factors),
        base_modules=base_modules,
    )
    return tensors, config


def adapter_bundle(adapter: Adapter, files: Mapping[str, str] | None = None) -> Bundle:
    """Return an adapter as a folder's content."""
    tensors, config = adapter
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return Bundle(tensors, ADAPTER_NAME, {CONFIG_NAME: text, **(files or {})})
