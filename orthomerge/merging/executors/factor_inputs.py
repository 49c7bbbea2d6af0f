"""Read what a merge of LoRA modules needs: every model's factors, DoRA's scales, the base's weight.

Modules of equal shape may come as one batch; nothing here forms a dense change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from orthomerge.adapters.lora import LoraAdapter
from orthomerge.checkpoints.digest import HashingSource
from orthomerge.linalg.factors import Factors, stacked
from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.onto_base import BaseWeight, module_updates, own_scales
from orthomerge.merging.lora.modules import JoinedLora, join_lora
from orthomerge.merging.plan import Task

__all__ = ["FactorInputs", "adapters_of", "joined_module", "read_factors"]


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


def read_factors(tasks: Sequence[Task], context: Context, *, hashing: bool = False) -> FactorInputs:
    """Read every model's factors; a module a model lacks is a change of rank 0, or left out."""
    adapters, sources = adapters_of(context), []
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
        return join_lora(task.module, adapters_of(context))
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


def adapters_of(context: Context) -> list[LoraAdapter]:
    """Return the adapters that are merged."""
    return [model.lora for model in context.plan.models if model.lora is not None]
