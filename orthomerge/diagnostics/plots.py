"""One picture of a diagnosis: residuals by layer and module, and a histogram of angles.

The figure is made without pyplot: no window, no state shared with the caller's own plots.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthomerge.diagnostics.measurements import ANGLE_EDGES, Diagnosis, LayerGeometry
from orthomerge.errors import MissingExtraError, OutputError

__all__ = ["check_plot", "heat_map_cells", "plot_diagnosis"]

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_CELL_WIDTH, _CELL_HEIGHT = 0.75, 0.28  # inches
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.9, 0.9, 0.7, 1.9  # margins in inches
_HISTOGRAM_HEIGHT = 2.6
_GAP, _LEAST_WIDTH = 0.2, 4.0
_MOST_ROWS_WITH_NUMBERS = 40
_WHITE_TEXT_BELOW = 0.15


def heat_map_cells(
    diagnosis: Diagnosis, model: int
) -> tuple[list[str], list[str], list[list[float]]]:
    """Return rows (layer numbers), columns (module names) and the value of each cell.

    The first number in a name is its layer, the rest its module. The value is the model's residual
    fraction / noise level; without a base, its largest angle in degrees. Matrices of a stack are
    averaged; what is not there is nan.

    Args:
        diagnosis: The measurements.
        model: Which model, from 0.
    """
    places = {layer.name: _place(layer.name) for layer in diagnosis.layers}
    rows = sorted({row for row, _ in places.values()}, key=lambda row: (not row, int(row or 0)))
    columns = list(dict.fromkeys(column for _, column in places.values()))
    found: dict[tuple[str, str], list[float]] = {}
    for layer in diagnosis.layers:
        value = _value(layer, model)
        if value is not None:
            found.setdefault(places[layer.name], []).append(value)
    cells = [[_mean(found.get((row, column), [])) for column in columns] for row in rows]
    return [row or "–" for row in rows], columns, cells


def check_plot(path: str | Path) -> None:
    """Refuse a plot that could not be written, before hours are spent on measuring.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: There is no such folder or format.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise MissingExtraError("matplotlib", "demo", "a plot") from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() in formats and Path(path).parent.is_dir():
        return
    raise OutputError(
        "the plot cannot be written there",
        file=path,
        expected="a file ending in .png, .svg or .pdf in a folder that exists",
    )


def plot_diagnosis(diagnosis: Diagnosis, path: str | Path) -> Path:
    """Draw the heat map over layers and modules and the histogram of angles into one file.

    Args:
        diagnosis: The measurements.
        path: Where to; the ending decides the format, e.g. ``.png`` or ``.svg``.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: The file cannot be written, or not in that format.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows, columns, _ = heat_map_cells(diagnosis, 0)
    panels = len(diagnosis.models)
    panel = (max(_CELL_WIDTH * len(columns), 2.0), max(_CELL_HEIGHT * len(rows), 0.6))
    inner = max(panels * panel[0] + (panels - 1) * _GAP, _LEAST_WIDTH)
    width, height = inner + _LEFT + _RIGHT, panel[1] + _TOP + _BOTTOM + _HISTOGRAM_HEIGHT + 0.6
    figure = Figure(figsize=(width, height), dpi=150)
    bottom = (height - _TOP - panel[1]) / height
    for at in range(panels):
        left = _LEFT + at * (panel[0] + _GAP)
        box = (left / width, bottom, panel[0] / width, panel[1] / height)
        image = _draw_cells(figure.add_axes(box), diagnosis, at)
    right = _LEFT + panels * (panel[0] + _GAP)
    figure.colorbar(image, cax=figure.add_axes((right / width, bottom, 0.15 / width, box[3])))
    what = "residual / noise level (0: rotation, 1: noise)" if diagnosis.base else "largest angle"
    figure.suptitle(what, x=_LEFT / width, y=1 - 0.1 / height, ha="left", va="top", size=10)
    box = (_LEFT / width, 0.6 / height, inner / width, _HISTOGRAM_HEIGHT / height)
    _draw_angles(figure.add_axes(box), diagnosis)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"the plot cannot be written: {error.strerror}", file=path) from error
    return Path(path)


def _place(name: str) -> tuple[str, str]:
    """Return (layer number or "", module) of a tensor name."""
    match = _LAYER.search(name)
    if match is None:
        return "", name.removesuffix(".weight")
    rest = name[match.end() :].lstrip(".").partition("[")[0].removesuffix(".weight")
    return match[1], re.sub(r"\.\d+(?=\.|$)", ".*", rest) or name


def _value(layer: LayerGeometry, at: int) -> float | None:
    model = layer.models[at]
    if model is None:
        return None
    return model.largest_angle if layer.base_norm is None else model.over_noise


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _draw_cells(axes: Any, diagnosis: Diagnosis, at: int) -> Any:
    """Draw one model's cells; grey where nothing is known."""
    rows, columns, cells = heat_map_cells(diagnosis, at)
    relative = diagnosis.base is not None
    largest = max((m.largest_angle for x in diagnosis.layers for m in x.models if m), default=1.0)
    axes.set_facecolor("0.85")
    colours, limit = ("RdYlBu", 1.2) if relative else ("Oranges", largest or 1.0)
    image = axes.imshow(cells, cmap=colours, aspect="auto", vmin=0.0, vmax=limit)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", size=8)
    axes.set_yticks(range(len(rows)), rows if at == 0 else [""] * len(rows), size=8)
    axes.set_title(_label(diagnosis, at), size=9)
    if at == 0:
        axes.set_ylabel("layer", size=9)
    if len(rows) <= _MOST_ROWS_WITH_NUMBERS:
        for row, line in enumerate(cells):
            for column, value in enumerate(line):
                text = "" if math.isnan(value) else f"{value:.2f}" if relative else f"{value:.1f}°"
                colour = "white" if relative and value < _WHITE_TEXT_BELOW else "black"
                axes.text(column, row, text, size=7, ha="center", va="center", color=colour)
    return image


def _label(diagnosis: Diagnosis, at: int) -> str:
    return f"{at + 1}: {Path(diagnosis.models[at]).name}".replace("$", r"\$")


def _draw_angles(axes: Any, diagnosis: Diagnosis) -> None:
    """Draw one outline per model over all layers; planes below the first edge are not drawn."""
    for at in range(len(diagnosis.models)):
        models = [layer.models[at] for layer in diagnosis.layers]
        counts = [model.angle_counts for model in models if model is not None]
        total = [sum(column) for column in zip(*counts, strict=True)] or [0] * len(ANGLE_EDGES)
        axes.stairs(total[1:], ANGLE_EDGES, label=_label(diagnosis, at), linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlim(ANGLE_EDGES[0], ANGLE_EDGES[-1])
    axes.set_xlabel("rotation angle in degrees (log scale)", size=9)
    axes.set_ylabel("planes", size=9)
    axes.set_title("angles of the rotations, all layers", size=10)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
