"""Write a merged LoRA module: onto the base's weight, or brought to its rank into an adapter.

What is written is sketched or measured, so that it can be checked when it is read back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.dora import dora_left_factor, dora_magnitudes
from orthomerge.adapters.lora_export import lora_tensors
from orthomerge.checkpoints.dtypes import torch_dtype
from orthomerge.linalg.factors import Factors, truncated_with_values
from orthomerge.linalg.sketching import sketch
from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.factor_inputs import FactorInputs, adapters_of
from orthomerge.merging.executors.onto_base import BaseWeight, merged_scales, write_weight
from orthomerge.merging.lora.lifting import merge_vectors
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.plan import Task

__all__ = ["write_module"]


def write_module(
    task: Task,
    module: JoinedLora,
    inputs: FactorInputs,
    merged: Factors,
    norm: Tensor | None,
    facts: dict[str, Any],
    context: Context,
) -> dict[str, Any]:
    """Write what the plan makes of one merged module; return digests and facts."""
    method, factor = context.plan.method, context.factor
    scales = merged_scales(method, inputs.scales, inputs.weights, task.parameters, facts, factor)
    merged = merged.scaled(context.factor)
    size = None if norm is None else norm.item() * abs(context.factor)
    details: dict[str, Any] = {}
    if context.plan.lora is None:
        assert inputs.base is not None
        details["written_norm"] = write_weight(task, context, inputs.base, merged, scales)
        facts["norm"] = merged.norm().item() if size is None else size
    else:
        stored, kept = _write_adapter(task, module, inputs, merged, size, scales, facts, context)
        details["written_sketch"] = sketch(stored).tolist()
        facts = {**facts, **kept}
    return {**details, "facts": facts, "digests": _digests(module, inputs, context)}


def _write_adapter(
    task: Task,
    module: JoinedLora,
    inputs: FactorInputs,
    merged: Factors,
    size: float | None,
    scales: Tensor | None,
    facts: Mapping[str, Any],
    context: Context,
) -> tuple[Factors, dict[str, Any]]:
    """Bring the product to its rank and write it; return what was written, and facts of it."""
    assert context.plan.lora is not None
    kept, lost = _reduced(merged, task.info.shape[0], size)
    magnitude = bias = None
    if context.plan.lora.dora:
        assert inputs.base is not None
        kept, magnitude = _with_magnitudes(kept, scales, inputs.base, task)
    elif context.plan.lora.biased and module.kind != "embedding":
        bias = _bias(task, module, inputs, facts, context)
    stored = kept.turned() if module.kind == "embedding" else kept
    output = context.plan.lora
    tensors = lora_tensors(
        output.names[task.module],
        stored.B,
        stored.A,
        kind=module.kind,
        kernel=module.kernel,
        magnitude=magnitude,
        bias=bias,
        style=output.style,
    )
    for info in task.outputs:
        context.emit(info, 0, tensors[info.name])
    dtype = torch_dtype(task.info.dtype)
    return Factors(*(X.to(dtype).to(context.compute) for X in (stored.B, stored.A))), lost


def _reduced(merged: Factors, rank: int, size: float | None) -> tuple[Factors, dict[str, Any]]:
    """Return the product at its rank: the norm, and the share of its square that is kept."""
    if merged.rank <= rank:
        norm = merged.norm().item() if size is None else size
        return merged.padded(rank), {"rank": rank, "energy": 1.0, "norm": norm}
    kept, values = truncated_with_values(merged, rank)
    squares = values.square()
    whole, part = squares.sum().item(), squares[:rank].sum().item()
    energy = part / whole if whole else 1.0
    return kept.padded(rank), {"rank": rank, "energy": energy, "norm": math.sqrt(part)}


def _with_magnitudes(
    change: Factors, scales: Tensor | None, base: BaseWeight, task: Task
) -> tuple[Factors, Tensor]:
    """Return the factors and magnitudes of the DoRA adapter that makes ``D W_0 + B A``."""
    D = torch.ones(change.B.shape[0], dtype=torch.float64) if scales is None else scales
    D = D.to(change.B.device)
    dtype = torch_dtype(task.info.dtype)
    # The norms that PEFT divides by are those of the rounded factors.
    B = dora_left_factor(D, change.B).to(dtype).to(change.B)
    A = change.A.to(dtype).to(change.A)
    m = dora_magnitudes(D, base.features(), D[:, None] * B.double(), A)
    return Factors(B, A), m


def _bias(
    task: Task,
    module: JoinedLora,
    inputs: FactorInputs,
    facts: Mapping[str, Any],
    context: Context,
) -> Tensor:
    """Return the change of the bias, merged as the method merges a full model's biases."""
    adapters, vectors = adapters_of(context), []
    for at in inputs.positions:
        part = module.parts[at]
        own = adapters[at].bias(part.name, context.compute) if part else None
        vectors.append(torch.zeros(module.rows, dtype=context.compute) if own is None else own)
    draws = replace(context.draws(task, inputs.positions), tensor=f"{module.name}.bias")
    merged = merge_vectors(
        context.plan.method,
        vectors,
        weights=inputs.weights,
        draws=draws,
        measured=facts.get("scale"),
        **task.parameters,
    )
    return merged * context.factor


def _digests(module: JoinedLora, inputs: FactorInputs, context: Context) -> list[list[list[str]]]:
    """Return the [tensor name, digest] pairs of each source, in the order base, models."""
    if not inputs.sources:
        return []
    found = [
        [[key, source.digest(key)] for key in (part.keys if part else ())]
        for source, part in zip(inputs.sources, module.parts, strict=True)
    ]
    if context.plan.base is None:
        return found
    base = inputs.base
    return [[[base.name, base.digest()]] if base else [], *found]
