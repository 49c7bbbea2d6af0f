"""How unlearning looks on a terminal: what it will do, every step, and the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orthomerge_cli.session import say

from orthomerge.recipe.sizes import format_size

if TYPE_CHECKING:
    from orthomerge.unlearning.training import (
        Estimate,
        PreparedSets,
        StepReport,
        UnlearnRequest,
        UnlearnResult,
    )

__all__ = ["announce", "dry_run_facts", "print_dry_run", "print_result", "step_progress"]

_PREVIEWED = 3


def announce(request: UnlearnRequest, sets: PreparedSets) -> None:
    """Say on standard error what was decided about the inputs."""
    objective, projection = request.objective, request.projection
    say(f"model      {request.model}", err=True)
    for name in ("forget", "retain", "holdout"):
        found = getattr(sets, name)
        if found is not None:
            apart = sets.check if name == "retain" and sets.check is not found else None
            more = "" if apart is None else f" + {len(apart)} only measured"
            say(f"{name:<10} {len(found)} rows{more}  ({getattr(request, name)})", err=True)
    weights = f"γ {objective.forget_weight:g}, α {objective.retain_weight:g}"
    say(f"objective  {objective.info.name}, {weights}", err=True)
    protected = "off" if projection is None else ", ".join(_spoken(projection))
    say(f"projection {protected}", err=True)
    say(f"trained    {request.adapter.kind}", err=True)
    for note in sets.notes:
        say(f"note: {note}", err=True)


def dry_run_facts(request: UnlearnRequest, sets: PreparedSets, found: Estimate) -> dict[str, Any]:
    """Return what a dry run says, JSON-ready."""
    named = {"forget": sets.forget, "retain": sets.retain, "check": sets.check}
    named |= {"holdout": sets.holdout, "alternate": sets.alternate}
    return {
        "model": request.model,
        "objective": request.objective.info.name,
        "sets": {
            name: {"rows": len(rows), "scored_tokens": rows.scored_tokens, "longest": rows.longest}
            for name, rows in named.items()
            if rows is not None
        },
        "preview": [_preview_fact(row) for row in _previews(sets)],
        "estimate": found.as_dict(),
        "notes": list(sets.notes),
    }


def print_dry_run(request: UnlearnRequest, sets: PreparedSets, found: Estimate) -> None:
    """Print what a run would read, train on and need."""
    announce(request, sets)
    say("\nFirst rows of the forget set; what is scored stands in [brackets]:")
    for row in _previews(sets):
        text = "".join(f"[{part}]" if scored else part for part, scored in row.runs)
        say(f"  {row.where}: {' '.join(text.split())}")
    say(f"\ntrained numbers  {found.trained:,} of {found.parameters:,}")
    for name in ("model", "training", "projection", "activation", "reference"):
        size = getattr(found, f"{name}_bytes")
        if size:
            say(f"{name:<12} about {format_size(size)}")
    say(f"{'in all':<12} about {format_size(found.peak_bytes)}")
    total = found.seconds_per_step * found.steps
    say(f"at most {found.steps} steps of about {found.seconds_per_step:.2g} s: {_spell(total)}")


@contextmanager
def step_progress(steps: int, *, show: bool) -> Iterator[Callable[[StepReport], None] | None]:
    """Show the steps as they are taken; yields what is to be told of each."""
    if not show:
        yield None
        return
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("unlearning", total=steps, facts="")
        yield lambda step: progress.update(task, completed=step.step, facts=_facts(step))


def print_result(result: UnlearnResult) -> None:
    """Print the table before and after, why it ended, and where the output is."""
    say(f"{'set':<9}{'rows':>6}{'loss':>9}{'→':>3}{'':<9}{'probability':>12}{'→':>3}", err=True)
    for row in result.table:
        say(
            f"{row.name:<9}{row.rows:>6}{row.loss_before:>9.3f}  → {row.loss_after:<8.3f}"
            f"{row.probability_before:>12.3f}  → {row.probability_after:.3f}",
            err=True,
        )
    say(f"{result.reason}; step {result.kept} of {result.steps} is kept", err=True)
    for warning in result.warnings:
        say(f"warning: {warning}", err=True)
    say(str(result.output))


def _line(step: StepReport) -> None:
    if step.reading is not None:
        say(f"step {step.step}/{step.steps}  {_facts(step)}", err=True)


def _facts(step: StepReport) -> str:
    parts = [f"loss {step.forget_loss:.3f}"]
    if step.reading is not None:
        parts.append(f"forget {step.reading.forget:.3f}")
        if step.reading.retain is not None:
            parts.append(f"retain {step.reading.retain:.3f}")
    if step.projection is not None and step.projection.get("kept") is not None:
        parts.append(f"kept {step.projection['kept']:.0%}")
    return ", ".join(parts)


def _spoken(projection: Any) -> list[str]:
    named = {k: v for k, v in projection.items() if k in ("stage", "mode", "rows", "history")}
    return ["on", *(f"{k} {v}" for k, v in named.items())]


def _previews(sets: PreparedSets) -> list[Any]:
    from orthomerge.unlearning.data import preview

    return preview(sets.forget, sets.tokenizer, _PREVIEWED)


def _preview_fact(row: Any) -> dict[str, Any]:
    return {"where": row.where, "runs": [{"text": t, "scored": s} for t, s in row.runs]}


def _spell(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
