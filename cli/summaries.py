"""How plans and results look, as text and as JSON-ready facts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orthomerge_cli.session import print_json, say

from orthomerge.recipe.sizes import format_size

if TYPE_CHECKING:
    from orthomerge.merging.plan import Plan
    from orthomerge.merging.run import MergeResult

__all__ = ["announce", "plan_facts", "print_plan", "print_result", "result_facts"]

_MOST_NOTES = 8
_LOSSLESS = 1 - 1e-6
_LOW_ENERGY = 0.9  # of the squared norm of a merged module's change


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Return what a plan says, JSON-ready."""
    output = plan.lora
    kinds: dict[str, int] = {}
    for task in plan.tasks:
        kinds[task.kind] = kinds.get(task.kind, 0) + 1
    return {
        "method": plan.method.name,
        "space": plan.method.space.value,
        "models": [{"origin": m.origin, "kind": m.description} for m in plan.models],
        "base": plan.base and {"origin": plan.base.origin, "kind": plan.base.description},
        "parameters": dict(plan.request.parameters),
        "output": plan.request.output and str(plan.request.output),
        "adapter": output
        and {
            "style": output.style,
            "dora": output.dora,
            "rank": plan.request.recipe.get("output", {}).get("rank", "lossless"),
            "largest_rank": max(output.bounds.values()),
            "modules": len(output.modules),
        },
        "tensors": len(plan.tasks),
        "tasks": kinds,
        "shards": [shard.filename for shard in plan.layout.shards],
        "compute_dtype": plan.compute_dtype,
        "output_dtypes": plan.output_dtypes,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "peak_working_memory_bytes": plan.peak_bytes,
        "memory_budget_bytes": plan.budget_bytes,
        "workers": plan.workers,
        "device": plan.request.device,
        "notes": list(plan.notes),
        "plan_hash": plan.hash(),
    }


def announce(plan: Plan) -> None:
    """Say on standard error what was decided about the inputs and the method."""
    for source in plan.models:
        say(f"model  {source.origin}  ({source.description})", err=True)
    if plan.base:
        say(f"base   {plan.base.origin}  ({plan.base.description})", err=True)
    chosen = "" if plan.request.method else ", chosen by the inputs"
    say(f"method {plan.method.name}{chosen}", err=True)
    _print_notes(plan)


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """Print a plan."""
    facts = plan_facts(plan)
    if as_json:
        return print_json(facts)
    announce(plan)
    dtypes = ", ".join(f"{name} {format_size(size)}" for name, size in plan.output_dtypes.items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["tasks"].items())
    files = len(plan.layout.shards)
    say(f"tensors         {len(plan.tasks)} ({kinds})")
    say(f"compute dtype   {plan.compute_dtype}, rounded once to the output dtype")
    say(f"output          {facts['output'] or 'in memory'}: {files} file(s), {dtypes}")
    if plan.lora is not None:
        adapter = facts["adapter"]
        found = ", found when it runs" if plan.lora.from_data else ""
        say(
            f"adapter         {adapter['style']}, {adapter['modules']} modules, "
            f"rank {adapter['rank']} (at most {adapter['largest_rank']}{found})"
        )
    say(f"reads           {format_size(plan.read_bytes)}")
    say(f"writes          {format_size(plan.write_bytes)}")
    say(
        f"working memory  {format_size(plan.peak_bytes)} of a budget of "
        f"{format_size(plan.budget_bytes)}, beside Python and torch"
    )
    say(f"runs on         {plan.request.device}, {plan.workers} thread(s)")


def result_facts(result: MergeResult) -> dict[str, Any]:
    """Return what a finished merge says, JSON-ready."""
    return {
        **plan_facts(result.plan),
        "seconds": round(result.seconds, 3),
        "resumed_tensors": result.resumed_tensors,
        "rotations": result.rotations,
        "facts": result.facts,
    }


def print_result(result: MergeResult) -> None:
    """Print a finished merge on standard error and the output's path on standard output."""
    speed = result.plan.read_bytes / max(result.seconds, 1e-9)
    resumed = f", {result.resumed_tensors} of them resumed" if result.resumed_tensors else ""
    say(
        f"merged {len(result.plan.tasks)} tensors{resumed} in {result.seconds:.1f} s "
        f"({format_size(speed)}/s read)",
        err=True,
    )
    if result.rotations:
        angle = max(r["largest_angle_degrees"] for r in result.rotations.values())
        residual = max(r["orthogonality_residual"] for r in result.rotations.values())
        say(
            f"rotations: largest angle {angle:.2f}°, distance from orthogonality {residual:.1e}",
            err=True,
        )
    for line in (*_measured(result.facts), *_ranks(result.facts)):
        say(line, err=True)
    say(str(result.output))


def _measured(facts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say in a line or two what a method of whole tensors found."""
    layers = [part for found in facts.values() for part in found.get("stack", [found])]
    fitted = [layer["models"] for layer in layers if layer.get("models")]
    if fitted:
        rotated = sum(any(model["rotated"] for model in models) for models in fitted)
        updates = sum(model["rotated"] for models in fitted for model in models)
        total = sum(map(len, fitted))
        rest = "; the rest went to the residual method" if updates < total else ""
        yield f"rotated {rotated} of {len(fitted)} layers ({updates} of {total} updates){rest}"
    turned = [max(layer["angles"]) for layer in layers if layer.get("angles")]
    if turned:
        yield f"turned {len(turned)} layers by up to {math.degrees(max(turned)):.2f}°"


def _ranks(facts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say in a line what the rank of a merged adapter kept."""
    modules = {name: found for name, found in facts.items() if "energy" in found}
    if not modules:
        return
    ranks = sorted({found["rank"] for found in modules.values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    least = min(modules, key=lambda name: modules[name]["energy"])
    energy = modules[least]["energy"]
    kept = "lossless" if energy > _LOSSLESS else f"keeps at least {energy:.1%} of a module's energy"
    yield f"adapter of rank {span}, {kept}"
    if energy < _LOW_ENERGY:
        module = least.removeprefix("base_model.model.").partition(".lora")[0]
        remedy = "Raise --rank or leave it out (lossless)."
        yield f"warning: little is kept, least in {module}. {remedy}"


def _print_notes(plan: Plan) -> None:
    for note in plan.notes[:_MOST_NOTES]:
        say(f"note   {note}", err=True)
    if len(plan.notes) > _MOST_NOTES:
        say(f"note   … and {len(plan.notes) - _MOST_NOTES} more (--json lists all)", err=True)
