"""From a checked recipe to a plan or a finished merge; the doors ``merge`` and ``plan``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters.memory import AdapterState
from orthomerge.checkpoints.sources import CheckpointSource
from orthomerge.errors import RecipeError
from orthomerge.merging.lora.ranks import parse_rank
from orthomerge.merging.plan import MergeRequest, Plan
from orthomerge.merging.planning.planner import build_plan
from orthomerge.recipe.loader import recipe_from_data
from orthomerge.recipe.schema import MergeRecipe
from orthomerge.recipe.yaml_positions import Document

if TYPE_CHECKING:
    from orthomerge.merging.run import MergeResult

__all__ = ["merge", "plan", "plan_recipe", "request_from"]


def request_from(recipe: MergeRecipe) -> MergeRequest:
    """Translate a recipe into the engine's own terms."""
    weights = tuple(entry.weight for entry in recipe.models)
    given = any(weight is not None for weight in weights)
    return MergeRequest(
        models=tuple(entry.path for entry in recipe.models),
        base=recipe.base,
        method=recipe.method,
        weights=tuple(1.0 if w is None else w for w in weights) if given else None,
        parameters=recipe.parameters,
        output=Path(recipe.output.path) if recipe.output.path is not None else None,
        dtype=recipe.output.dtype,
        compute_dtype=recipe.run.compute_dtype,
        max_shard_bytes=recipe.output.max_shard_size,
        missing=recipe.missing,
        back_map=recipe.output.back_map,
        form=recipe.output.form,
        rank=parse_rank(recipe.output.rank),
        style=recipe.output.style,
        component=recipe.output.component,
        absent=recipe.adapters.absent,
        heads=recipe.adapters.heads,
        assume_same_base=recipe.adapters.assume_same_base,
        provenance=recipe.output.provenance,
        memory_budget_bytes=recipe.run.memory_budget,
        device=recipe.run.device,
        workers=recipe.run.workers,
        seed=recipe.seed,
        norm_matched=recipe.norm_matched,
        recipe=recipe.record(),
    )


def plan_recipe(recipe: MergeRecipe) -> Plan:
    """Plan a recipe's merge from headers only."""
    return build_plan(request_from(recipe))


def plan(
    models: Sequence[CheckpointSource | AdapterState],
    *,
    base: CheckpointSource | None = None,
    method: str | None = None,
    weights: Sequence[Any] | None = None,
    output: str | Path | None = None,
    missing: str = "error",
    norm_matched: float | None = None,
    seed: int = 0,
    output_settings: Mapping[str, Any] | None = None,
    adapter_settings: Mapping[str, Any] | None = None,
    run_settings: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> Plan:
    """Check a merge and say what it would do, without reading a tensor.

    Args:
        models: Paths, hub names (``hf:org/name``), state dicts, or adapters in memory.
        base: The model they were fine-tuned from, for methods that need it.
        method: Method id; None lets the sources decide.
        weights: One value per model: a number, a gradient, or rules.
        output: Folder, or file ending in ``.safetensors``; None keeps the result in memory.
        missing: ``error``, ``copy-base`` or ``skip``: tensors that not every model has.
        norm_matched: Size of the whole update, as a multiple of the size of the sum of all models'
            changes; None leaves it as the method makes it.
        seed: Seed of methods that draw random numbers.
        output_settings: Keys of a recipe's ``output``: dtype, form, rank, style, component,
            max_shard_size, back_map, provenance.
        adapter_settings: Keys of a recipe's ``adapters``: absent, heads, assume_same_base.
        run_settings: Keys of a recipe's ``run``: device, compute_dtype, memory_budget, workers.
        **parameters: The method's parameters.

    Raises:
        OrthoMergeError: Something is wrong; ``ProblemsError`` lists several.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> plan([a, b]).method.name
        'geodesic'
    """
    if weights is not None and len(weights) != len(models):
        raise RecipeError("one weight per model", expected=len(models), found=len(weights))
    given_weights = weights or [None] * len(models)
    data = {
        "models": [{"path": m, "weight": w} for m, w in zip(models, given_weights, strict=True)],
        "base": base,
        "method": method,
        "parameters": parameters,
        "missing": missing,
        "adapters": dict(adapter_settings or {}),
        "norm_matched": norm_matched,
        "seed": seed,
        "output": {**(output_settings or {}), "path": None if output is None else str(output)},
        "run": dict(run_settings or {}),
    }
    given = {key: value for key, value in data.items() if value is not None}
    return plan_recipe(recipe_from_data(Document(given, "arguments")))


def merge(
    models: Sequence[CheckpointSource | AdapterState],
    *,
    resume: bool = False,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
    **settings: Any,
) -> MergeResult:
    """Merge models, in memory or into a published folder or file.

    Args:
        models: Paths, hub names (``hf:org/name``), state dicts, or adapters in memory.
        resume: Continue an interrupted run of the same merge.
        overwrite: Replace an existing output.
        advance: Progress: called with input bytes as they are read, from any thread.
        **settings: As for ``plan``.

    Returns:
        The result; ``tensors`` holds the merged state dict when no ``output`` was given.

    Raises:
        OrthoMergeError: Something is wrong; nothing is published then.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> merge([a, b], weights=[1.0, 3.0]).tensors["w"]
        tensor([0.7500, 0.7500])
    """
    from orthomerge.merging.run import run_plan  # imports torch, which planning does without

    prepared = plan(models, **settings)
    return run_plan(prepared, resume=resume, overwrite=overwrite, advance=advance)
