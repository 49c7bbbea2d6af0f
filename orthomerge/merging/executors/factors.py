"""Merge LoRA modules as low-rank factors: read them, run the method, bring the result to its rank.

Modules of equal shape may come as one batch; nothing here forms a dense change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.lora import LoraAdapter
from orthomerge.adapters.lora_export import lora_tensors
from orthomerge.checkpoints.digest import hash_tensor
from orthomerge.errors import OrthoMergeError
from orthomerge.linalg.factors import Factors, concatenated, singular_values, truncated
from orthomerge.merging.executors.context import Context
from orthomerge.merging.lifting import merge_factors
from orthomerge.merging.lora_modules import JoinedLora, join_lora
from orthomerge.merging.plan import Task

__all__ = ["FactorInputs", "joined_module", "read_factors", "run"]


@dataclass(frozen=True)
class FactorInputs:
    """The factors of one or several modules of equal shape.

    Attributes:
        modules: What each task merges.
        factors: One per model that takes part; with a leading axis of modules for a batch.
        weights: One per model that takes part.
        positions: Which models those are.
        scales: What each model's B was multiplied by, of the first module.
    """

    modules: list[JoinedLora]
    factors: list[Factors]
    weights: list[float]
    positions: list[int]
    scales: list[float]


def run(tasks: Sequence[Task], context: Context) -> list[dict[str, Any]]:
    """Merge one module, or a batch of equal shape; return the details of each."""
    method = context.plan.method
    inputs = read_factors(tasks, context)
    try:
        merged = merge_factors(
            method,
            inputs.factors,
            weights=inputs.weights,
            survey=context.survey,
            draws=context.draws(tasks[0], inputs.positions),
            scales=inputs.scales,
            **tasks[0].parameters,
        )
    except OrthoMergeError as error:
        error.about(inputs.modules[0].name)  # the linear algebra does not know it
        raise
    details = []
    for at, (task, module) in enumerate(zip(tasks, inputs.modules, strict=True)):
        result = _item(merged.tensor, at, batched=len(tasks) > 1)
        if context.norms is not None:
            sources = [_item(f, at, batched=len(tasks) > 1) for f in inputs.factors]
            total = concatenated(sources).norm().item()
            context.norms.add_squares(result.norm().item() ** 2, total**2)
        elif context.spectra is not None:
            context.spectra[module.name] = singular_values(result).tolist()
        facts = _facts(merged.facts, at, batched=len(tasks) > 1)
        details.append({} if context.measuring else _write(task, module, result, facts, context))
        context.advance(task.read_bytes)
    return details


def joined_module(task: Task, context: Context) -> JoinedLora:
    """Return the module that a task merges, over all adapters."""
    name = next(name for name in task.models if name is not None)
    return join_lora(name, _adapters(context))


def read_factors(tasks: Sequence[Task], context: Context) -> FactorInputs:
    """Read every model's factors; a module a model lacks is a change of rank 0, or left out."""
    adapters = _adapters(context)
    modules = [joined_module(task, context) for task in tasks]
    skip = context.plan.request.absent == "skip"
    here = [at for at, part in enumerate(modules[0].parts) if part is not None or not skip]
    factors = []
    for at in here:
        parts = [_factors(adapters[at], module, at, context) for module in modules]
        whole = parts[0] if len(parts) == 1 else _stacked(parts)
        factors.append(whole.to(device=context.device))
    scales = [_scale(modules[0], at) for at in here]
    return FactorInputs(modules, factors, [tasks[0].weights[at] for at in here], here, scales)


def _scale(module: JoinedLora, at: int) -> float:
    """Return by what B was multiplied, compared with A; of an embedding that is turned."""
    part = module.parts[at]
    if part is None:
        return 1.0
    return 1 / part.scale if module.kind == "embedding" and part.scale else part.scale


def _factors(adapter: LoraAdapter, module: JoinedLora, at: int, context: Context) -> Factors:
    """Return (B [o, r], A [r, n]) with o output and n input features, an embedding's too."""
    if module.parts[at] is None:
        B = torch.zeros(module.rows, 0, dtype=context.compute)
        return Factors(B, torch.zeros(0, module.columns, dtype=context.compute))
    product = Factors(*adapter.factors(module.name, context.compute))
    return product.turned() if module.kind == "embedding" else product


def _stacked(parts: Sequence[Factors]) -> Factors:
    return Factors(torch.stack([part.B for part in parts]), torch.stack([p.A for p in parts]))


def _write(
    task: Task, module: JoinedLora, merged: Factors, facts: dict[str, Any], context: Context
) -> dict[str, Any]:
    """Bring the product to its rank, write its tensors, and say what was lost."""
    rank = task.info.shape[0]
    whole = merged.norm().item()
    if merged.rank > rank:
        merged = truncated(merged, rank)
    kept = merged.norm().item()
    merged = merged.scaled(context.factor).padded(rank)
    stored = merged.turned() if module.kind == "embedding" else merged
    tensors = lora_tensors(module.name, stored.B, stored.A, kind=module.kind, kernel=module.kernel)
    outputs = {info.name: info for info in task.outputs}
    for name, values in tensors.items():
        context.emit(outputs.pop(name), 0, values)
    for info in outputs.values():
        context.emit(info, 0, _bias(task, module, context))
    energy = (kept / whole) ** 2 if whole else 1.0
    facts = {**facts, "rank": rank, "energy": min(1.0, energy), "norm": kept * context.factor}
    digests = _digests(task, module, context) if context.plan.request.provenance else []
    return {"digests": digests, "facts": facts}


def _bias(task: Task, module: JoinedLora, context: Context) -> Tensor:
    """Return the sum of the models' changes of the bias, weighted as the weights' are."""
    total = torch.zeros(module.rows, dtype=context.compute)
    for adapter, weight in zip(_adapters(context), task.weights, strict=True):
        own = adapter.bias(module.name, context.compute) if module.name in adapter.modules else None
        total = total if own is None else total + weight * own
    return total * context.factor


def _digests(task: Task, module: JoinedLora, context: Context) -> list[list[list[str]]]:
    """Return the [tensor name, digest] pairs of each source, in the order base, models."""
    models = zip(context.plan.models, module.parts, strict=True)
    found = [
        [[k, hash_tensor(m.checkpoint, k)] for k in (part.keys if part else ())]
        for m, part in models
    ]
    return [[], *found] if context.plan.base else found


def _adapters(context: Context) -> list[LoraAdapter]:
    return [model.lora for model in context.plan.models if model.lora is not None]


def _item(product: Factors, at: int, *, batched: bool) -> Factors:
    return Factors(product.B[at], product.A[at]) if batched else product


def _facts(facts: Mapping[str, Any], at: int, *, batched: bool) -> dict[str, Any]:
    """Return one module's facts as plain values; a batch's are tensors with one entry each."""

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value[at] if batched else value).tolist()

    return {key: plain(value) for key, value in facts.items()}
