"""``orthomerge demo``: train small experts on real digits, merge them, compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say

if TYPE_CHECKING:
    from orthomerge.demo import DemoResult

_TABLE_WIDTH = 90


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for models and results.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the whole demo.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A much smaller version.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    json: Json = False,
) -> None:
    """Train experts for visual domains on scikit-learn's digits, merge and compare them.

    Needs the extra `demo`, no network, and under two minutes on two cores.
    """
    from orthomerge.demo import run_demo

    result = run_demo(
        out,
        seed=seed,
        quick=quick,
        overwrite=overwrite,
        say=lambda line: say(line, err=True),
    )
    if json:
        return print_json(_facts(result))
    _print_table(result)
    say(f"chart    {result.png_path}\ntable    {result.markdown_path}")
    say(f"numbers  {result.json_path}\ntime     {result.seconds:.0f} s")


def _facts(result: DemoResult) -> dict[str, Any]:
    return {
        "columns": result.columns,
        "rows": [dataclasses.asdict(row) for row in result.rows],
        "seconds": round(result.seconds, 1),
        "chart": str(result.png_path),
        "table": str(result.markdown_path),
        "numbers": str(result.json_path),
    }


def _print_table(result: DemoResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Accuracy in %; the mean is over the experts' domains, without clean")
    for column in ("model", *result.columns, "mean"):
        justify: Literal["left", "right"] = "left" if column == "model" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    group = None
    for row in result.rows:
        if group not in (None, row.group):
            table.add_section()
        group = row.group
        cells = [f"{100 * row.accuracy[column]:.1f}" for column in result.columns]
        table.add_row(row.name, *cells, f"{100 * row.mean:.1f}")
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)  # a log file has no width of its own
    console.print(table)
