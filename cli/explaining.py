"""``merge --explain``: what a merge of LoRA adapters would meet, measured without merging."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orthomerge_cli.session import print_json, printable, say
from orthomerge_cli.summaries import announce

if TYPE_CHECKING:
    from orthomerge.diagnostics import (
        Comparison,
        MergeVerdict,
        ModuleComparison,
        SideComparison,
        TotalComparison,
    )
    from orthomerge.recipe.explaining import Explanation
    from orthomerge.recipe.schema import MergeRecipe

__all__ = ["explain"]

_MOST_MODULES, _MOST_COLUMNS = 12, 500


def explain(recipe: MergeRecipe, *, as_json: bool) -> None:
    """Read the adapters of a merge, write nothing, and print what their merge would meet.

    Raises:
        RecipeError: A source is no LoRA adapter.
        OrthoMergeError: The merge itself is refused.
    """
    from orthomerge.recipe.explaining import explainable, measured

    found = explainable(recipe)
    if not as_json:
        announce(found.plan)
        for note in found.notes:
            say(f"note   {note}", err=True)
    if not as_json and sys.stderr.isatty():
        from orthomerge_cli.progress import byte_progress

        with byte_progress(found.observed.read_bytes, "measuring") as advance:
            explanation = measured(found, advance=advance)
    else:
        explanation = measured(found)
    if as_json:
        return print_json(_facts(explanation))
    _print(explanation.comparison, explanation.verdict)


def _facts(explanation: Explanation) -> dict[str, Any]:
    """Return everything, JSON-ready."""
    plan = explanation.plan
    return {
        "verdict": dataclasses.asdict(explanation.verdict),
        "method": plan.method.name,
        "parameters": dict(plan.request.parameters),
        "base": plan.base and plan.base.origin,
        "kinds": [model.description for model in plan.models],
        "notes": [*plan.notes, *explanation.notes],
        **explanation.comparison.as_dict(),
    }


def _print(comparison: Comparison, said: MergeVerdict) -> None:
    total = comparison.total
    _print_table(["", "adapter", *_ADAPTER], _adapter_rows(comparison))
    shown = sorted(comparison.modules, key=_order)[:_MOST_MODULES]
    rows = [(printable(m.name.removesuffix(".weight")), *_cells(m).values()) for m in shown]
    everything = (f"all {total.modules} modules", *_cells(total).values())
    _print_table(["module", *_cells(total)], [*rows, everything])
    if len(comparison.modules) > len(shown):
        say(f"… and {len(comparison.modules) - len(shown)} more (--json lists all)")
    say(f"verdict  {said.text}")


def _order(module: ModuleComparison) -> tuple[float, float]:
    """Order the modules first in which the plain sum serves some adapter worst."""
    least = module.least_sum_alignment
    return (2.0 if least is None else least), -(module.imbalance or 0.0)


_ADAPTER = ("f", "share", "MV within", "cos sum", "cos merged", "cos with 1, 2, …")


def _adapter_rows(comparison: Comparison) -> Iterable[Sequence[str]]:
    total = comparison.total
    for at, origin in enumerate(comparison.models):
        yield (
            str(at + 1),
            printable(origin),
            f"{total.sizes[at]:.3g}",
            _number(total.shares[at], ".1%"),
            _number(total.mv_within[at]),
            _number(total.sum_alignment[at]),
            _number(total.alignment[at] if total.alignment else None),
            "  ".join(_number(value) for value in total.cosines[at]),
        )


def _cells(part: ModuleComparison | TotalComparison) -> Mapping[str, str]:
    scale = part.scale
    low, high = (min(scale), max(scale)) if isinstance(scale, tuple) else (scale, scale)
    rank = getattr(part, "rank", None)
    return {
        "f": _span(part.sizes, ".2g"),
        "imbalance": _number(part.imbalance, ".3g"),
        "MV": _number(part.mv),
        "MV col": _number(part.mv_columns),
        "cos": _span([c for i, row in enumerate(part.cosines) for c in row[:i]]),
        "min cos sum": _number(part.least_sum_alignment),
        "merged": _number(part.least_alignment),
        "ρ A": _overlap(part.A),
        "ρ B": _overlap(part.B),
        "drift A": _number(part.A.drift),
        "drift B": _number(part.B.drift),
        "frames A": _frames(part.A),
        "frames B": _frames(part.B),
        "eff. rank": _number(part.effective_rank, ".1f"),
        "rank": "" if rank is None else str(rank),
        "kept": _number(part.energy, ".1%"),
        "λ": _span([low, high], ".3g"),
    }


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _span(values: Iterable[float | None], form: str = ".2f") -> str:
    """Return the lowest and the highest of several values."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = format(min(known), form), format(max(known), form)
    return low if low == high else f"{low}..{high}"


def _overlap(side: SideComparison) -> str:
    """Return the overlap, and what the method leaves of it where that is known."""
    before = side.overlap if side.overlap_before is None else side.overlap_before
    after = "" if side.overlap_after is None else f" → {side.overlap_after:.2f}"
    return f"{_number(before)}{after}"


def _frames(side: SideComparison) -> str:
    if side.principal_cosine is None:
        return "–"
    return f"{side.principal_cosine:.2f} ({_number(side.chance)})"


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table without the columns in which nothing is known."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    known = [at for at in range(len(columns)) if any(row[at] not in ("", "–") for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at in known:
        left = columns[at] in ("module", "adapter")
        table.add_column(columns[at], justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[at]) for at in known))
    console = Console()
    needed = console.measure(table, options=console.options.update(width=_MOST_COLUMNS)).maximum
    console.width = max(console.width, needed)  # cells are never cut; the terminal may wrap
    console.print(table)
