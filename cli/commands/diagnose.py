"""``orthomerge diagnose``: is a fine-tune rotational, and what would merging rotations do."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from orthomerge_cli.options import Device, Json
from orthomerge_cli.session import print_json, printable, say

if TYPE_CHECKING:
    from orthomerge.diagnostics.measurements import Diagnosis, LayerGeometry, ModelGeometry
    from orthomerge.diagnostics.verdict import Verdict

_MOST_COLUMNS = 500


def diagnose(
    models: Annotated[list[str], typer.Argument(help="Files, folders or hf:org/name.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Model they were fine-tuned from.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Glob: measure layers of these names only.")
    ] = None,
    anchor: Annotated[
        float, typer.Option("--anchor", min=0.0, help="Relative anchor of the fits at identity.")
    ] = 1e-3,
    block: Annotated[
        int | None, typer.Option("--block", min=1, help="Fit rotations in blocks of this size.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Measure embeddings and output heads too.")
    ] = False,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=2, help="Rows sampled for hyperspherical energy.")
    ] = 2048,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw heat map and angles to this file.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Layers to print.")] = 30,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure how fine-tunes moved their base, layer by layer, and say what it means.

    Adapters that rotate (OFT, BOFT, HRA) need no --base; everything else does.
    """
    _check_plot(plot)
    found = _measure(
        models, base, layers, embeddings, json,
        {"anchor": anchor, "block": block, "max_rows": max_rows, "device": device or "cpu"},
    )  # fmt: skip
    from orthomerge.diagnostics.verdict import judge

    said = judge(found)
    if plot is not None:
        from orthomerge.diagnostics.plots import plot_diagnosis

        plot_diagnosis(found, plot)
    if json:
        return print_json({"verdict": dataclasses.asdict(said), **found.as_dict()})
    _print(found, said, limit)
    if plot is not None:
        say(f"plot     {plot}")


def _check_plot(plot: Path | None) -> None:
    """Refuse a plot that cannot be drawn before anything is measured."""
    if plot is not None:
        from orthomerge.diagnostics.plots import check_plot

        check_plot(plot)


def _measure(
    models: list[str],
    base: str | None,
    layers: str | None,
    embeddings: bool,
    json: bool,
    settings: dict[str, Any],
) -> Diagnosis:
    from orthomerge.diagnostics.geometry import Settings, measure
    from orthomerge.diagnostics.survey import plan_survey

    survey = plan_survey(
        models, base, layers=layers, include_embeddings=embeddings, block=settings["block"]
    )
    chosen = Settings(**settings)
    if json or not sys.stderr.isatty():
        return measure(survey, chosen)
    from orthomerge_cli.progress import byte_progress

    with byte_progress(survey.read_bytes, "measuring") as advance:
        return measure(survey, chosen, advance)


def _print(found: Diagnosis, said: Verdict, limit: int) -> None:
    for at, (origin, kind) in enumerate(zip(found.models, found.kinds, strict=True), 1):
        say(f"model {at:<3}{origin}  ({kind})")
    if found.base:
        say(f"base     {found.base}")
    skipped = ", ".join(f"{count} {why}" for why, count in found.skipped.items())
    say(f"layers   {len(found.layers)} measured" + (f"; left out: {skipped}" if skipped else ""))
    shown = sorted(found.layers, key=_order)[:limit]
    if shown:
        _print_table(found, shown)
    if len(found.layers) > len(shown):
        say(f"… and {len(found.layers) - len(shown)} more (--limit, --json)")
    say(f"verdict  {said.text}")


def _order(layer: LayerGeometry) -> tuple[float, float]:
    """Order the most rotational layers first; without a base, those that turn furthest."""
    over = [m.over_noise for m in layer.models if m is not None and m.over_noise is not None]
    return min(over, default=2.0), -layer.merged.largest_angle


def _print_table(found: Diagnosis, layers: Sequence[LayerGeometry]) -> None:
    """Print a row per layer, or per layer and model where there are several models."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    several = len(found.models) > 1
    columns = _BASED if found.base is not None else _UNBASED
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    if several:
        table.add_column("model", justify="right")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for layer in layers:
        for at, model in enumerate(layer.models):
            facts = {} if model is None else _model_cells(model)
            facts |= {} if at else _layer_cells(layer)
            name = "" if at else printable(layer.name.removesuffix(".weight"))
            cells = [
                name,
                *([str(at + 1)] if several else []),
                *(facts.get(c, "") for c in columns),
            ]
            table.add_row(*map(Text, cells))
    console = Console()
    needed = console.measure(table, options=console.options.update(width=_MOST_COLUMNS)).maximum
    console.width = max(console.width, needed)  # cells are never cut; the terminal may wrap
    console.print(table)


_BASED = (
    "change",
    "residual/noise",
    "max angle",
    "mean",
    ">90°",
    "c",
    "cos A",
    "cos D",
    "moved",
    "energy",
    "orth.",
    "cond W",
    "raised",
)
_UNBASED = ("max angle", "mean", ">90°", "‖A‖", "theta", "orth.", "c", "cos A")


def _model_cells(model: ModelGeometry) -> dict[str, str]:
    return {
        "change": "" if model.change is None else f"{model.change:.2%}",
        "residual/noise": "–" if model.over_noise is None else f"{model.over_noise:.2f}",
        "max angle": f"{model.largest_angle:.2f}°",
        "mean": f"{model.mean_angle:.2f}°",
        ">90°": f"{model.obtuse_fraction:.0%}",
        "‖A‖": f"{model.generator_norm:.3g}",
        "theta": "" if model.theta is None else f"{model.theta:.2g}",
        "orth.": f"{model.orthogonality:.0e}",
        "raised": "" if model.retries is None else str(model.retries),
    }


def _layer_cells(layer: LayerGeometry) -> dict[str, str]:
    energy, moved = layer.energy, layer.merged.moved
    cells = {
        "c": f"{layer.correction:.2f}",
        "cos A": _range(layer.generator_cosines),
        "cos D": _range(layer.change_cosines or ()),
        "moved": "" if moved is None else f"{moved:.2%}",
        "cond W": "" if layer.condition is None else f"{layer.condition:.0e}",
    }
    if energy is not None and energy.base:
        cells["energy"] = f"{energy.mean_merge / energy.base - 1:+.2%}"
    return cells


def _range(cosines: Sequence[Sequence[float | None]]) -> str:
    """Return the lowest and highest cosine of two different models."""
    pairs = [row[j] for i, row in enumerate(cosines) for j in range(i + 1, len(row))]
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return "–"
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return low if low == high else f"{low}..{high}"
