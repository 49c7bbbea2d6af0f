"""Merge LoRA modules as low-rank factors: read them, run the method, bring the result to its rank.

Modules of equal shape may come as one batch; nothing here forms a dense change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.dora import dora_left_factor, dora_magnitudes
from orthomerge.adapters.lora import LoraAdapter
from orthomerge.adapters.lora_export import lora_tensors
from orthomerge.checkpoints.digest import HashingSource
from orthomerge.checkpoints.dtypes import torch_dtype
from orthomerge.errors import OrthoMergeError
from orthomerge.linalg.factors import (
    Factors,
    concatenated,
    singular_values,
    stacked,
    truncated_with_values,
)
from orthomerge.linalg.sketching import sketch
from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.onto_base import (
    BaseWeight,
    change_norm,
    merged_scales,
    module_updates,
    own_scales,
    write_weight,
)
from orthomerge.merging.lora.lifting import merge_factors, merge_vectors
from orthomerge.merging.lora.modules import JoinedLora, join_lora
from orthomerge.merging.observing import MergedModule
from orthomerge.merging.plan import Task

__all__ = ["FactorInputs", "joined_module", "read_factors", "run"]


@dataclass
class FactorInputs:
    """The factors of one or several modules of equal shape.

    Attributes:
        modules: What each task merges.
        factors: One per model that takes part; with a leading axis of modules for a batch.
        weights: One per model that takes part.
        positions: Which models those are.
        scales: Per model, the diagonal by which a DoRA module scales its output features.
        base: The base's weight, where it is needed.
        sources: Per model, what its tensors were read through; empty if nothing is hashed.
    """

    modules: list[JoinedLora]
    factors: list[Factors]
    weights: list[float]
    positions: list[int]
    scales: list[Tensor | None] = field(default_factory=list)
    base: BaseWeight | None = None
    sources: list[HashingSource] = field(default_factory=list)

    @property
    def folded(self) -> list[float]:
        """By what each model's B is multiplied, compared with A; of the first module."""
        module = self.modules[0]
        found = [1.0 if part is None else part.scale for part in module.parts]
        if module.kind == "embedding":  # which is turned: the scale is in its A
            found = [1 / scale if scale else 0.0 for scale in found]
        return [found[at] for at in self.positions]


def run(tasks: Sequence[Task], context: Context) -> list[dict[str, Any]]:
    """Merge one module, or a batch of equal shape; return the details of each."""
    inputs = read_factors(tasks, context, hashing=not context.measuring)
    try:
        merged = merge_factors(
            context.plan.method,
            inputs.factors,
            weights=inputs.weights,
            survey=context.survey,
            draws=context.draws(tasks[0], inputs.positions),
            folded=inputs.folded,
            **tasks[0].parameters,
        )
    except OrthoMergeError as error:
        error.about(inputs.modules[0].name)  # the linear algebra does not know it
        raise
    batched = len(tasks) > 1
    details: list[dict[str, Any]] = []
    for at, (task, module) in enumerate(zip(tasks, inputs.modules, strict=True)):
        result = merged.tensor.item(at) if batched else merged.tensor
        facts = _facts(merged.facts, at, batched=batched)
        norm = merged.norm if merged.norm is None or not batched else merged.norm[at]
        if context.measuring:
            own = [factors.item(at) if batched else factors for factors in inputs.factors]
            _measure(task, result, own, inputs, facts, context)
            if context.observe is not None:
                context.observe(_observed(task, module, inputs, own, result, facts, context))
            details.append({})
        else:
            details.append(_write(task, module, inputs, result, norm, facts, context))
        context.advance(task.read_bytes)
    return details


def read_factors(tasks: Sequence[Task], context: Context, *, hashing: bool = False) -> FactorInputs:
    """Read every model's factors; a module a model lacks is a change of rank 0, or left out."""
    adapters, sources = _adapters(context), []
    if hashing and context.plan.request.provenance:
        sources = [HashingSource(model.checkpoint) for model in context.plan.models]
        adapters = [replace(a, source=s) for a, s in zip(adapters, sources, strict=True)]
    modules = [joined_module(task, context) for task in tasks]
    skip = context.plan.request.absent == "skip"
    here = [at for at, part in enumerate(modules[0].parts) if part is not None or not skip]
    weights = [tasks[0].weights[at] for at in here]
    inputs = FactorInputs(modules, [], weights, here, sources=sources)
    if tasks[0].base is not None:
        inputs.base = BaseWeight(tasks[0], context)
        updates = module_updates(tasks[0], context)
    for at in here:
        parts = [_factors(adapters[at], module, at, context) for module in modules]
        whole = (parts[0] if len(parts) == 1 else stacked(parts)).to(device=context.device)
        scales = None
        if inputs.base is not None and (update := updates[at]) is not None:
            scales = own_scales(adapters[at], update, whole, inputs.base)
        if scales is not None:  # W' - W0 = (D - I) W0 + (D B) A
            whole = Factors(whole.B * scales[:, None].to(whole.B), whole.A)
        inputs.factors.append(whole)
        inputs.scales.append(scales)
    return inputs


def joined_module(task: Task, context: Context) -> JoinedLora:
    """Return the module that a task merges, over all adapters."""
    if task.base is None:
        return join_lora(task.module, _adapters(context))
    updates = module_updates(task, context)
    return JoinedLora(task.base, tuple(u.module if u else None for u in updates))


def _factors(adapter: LoraAdapter, module: JoinedLora, at: int, context: Context) -> Factors:
    """Return (B [o, r], A [r, n]) with o output and n input features, an embedding's too."""
    part = module.parts[at]
    if part is None:
        B = torch.zeros(module.rows, 0, dtype=context.compute)
        return Factors(B, torch.zeros(0, module.columns, dtype=context.compute))
    product = Factors(*adapter.factors(part.name, context.compute))
    return product.turned() if module.kind == "embedding" else product


def _measure(
    task: Task,
    merged: Factors,
    own: Sequence[Factors],
    inputs: FactorInputs,
    facts: Mapping[str, Any],
    context: Context,
) -> None:
    """Measure what a run without writing is for: the size of the update, or its spectrum."""
    if context.norms is not None:
        method, scales, base = context.plan.method, inputs.scales, inputs.base
        D = merged_scales(method, scales, inputs.weights, task.parameters, facts, 1.0)
        update = change_norm(base, merged, D)
        moved = [diagonal - 1 for diagonal in scales if diagonal is not None]
        together = 1 + sum(moved[1:], moved[0]) if moved else None
        total = change_norm(base, concatenated(own), together)
        context.norms.add_squares(update**2, total**2)
    if context.spectra is not None:
        context.spectra[task.module] = singular_values(merged).tolist()


def _observed(
    task: Task,
    module: JoinedLora,
    inputs: FactorInputs,
    own: Sequence[Factors],
    merged: Factors,
    facts: dict[str, Any],
    context: Context,
) -> MergedModule:
    """Return what an observer sees of one module: one entry per model, whether it takes part."""
    found = dict(zip(inputs.positions, own, strict=True))
    factors = tuple(
        found.get(at) if part is not None else None for at, part in enumerate(module.parts)
    )
    return MergedModule(task, factors, merged, facts, context.factor)


def _write(
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
    adapters, vectors = _adapters(context), []
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


def _adapters(context: Context) -> list[LoraAdapter]:
    return [model.lora for model in context.plan.models if model.lora is not None]


def _facts(facts: Mapping[str, Any], at: int, *, batched: bool) -> dict[str, Any]:
    """Return one module's facts as plain values; a batch's are tensors with one entry each."""

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value[at] if batched else value).tolist()

    return {key: plain(value) for key, value in facts.items()}
