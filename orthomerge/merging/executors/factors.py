"""Merge LoRA modules as low-rank factors: read them, run the method, write or measure the result.

Modules of equal shape may come as one batch; nothing here forms a dense change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from orthomerge.errors import OrthoMergeError
from orthomerge.linalg.factors import Factors, concatenated, singular_values
from orthomerge.merging.executors.context import Context
from orthomerge.merging.executors.factor_inputs import FactorInputs, read_factors
from orthomerge.merging.executors.factor_outputs import write_module
from orthomerge.merging.executors.onto_base import change_norm, merged_scales
from orthomerge.merging.lora.lifting import merge_factors
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.observing import MergedModule
from orthomerge.merging.plan import Task

__all__ = ["run"]


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
            details.append(write_module(task, module, inputs, result, norm, facts, context))
        context.advance(task.read_bytes)
    return details


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


def _facts(facts: Mapping[str, Any], at: int, *, batched: bool) -> dict[str, Any]:
    """Return one module's facts as plain values; a batch's are tensors with one entry each."""

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value[at] if batched else value).tolist()

    return {key: plain(value) for key, value in facts.items()}
