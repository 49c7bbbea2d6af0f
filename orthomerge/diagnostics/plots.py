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
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.9, 1.2, 0.6, 1.5  # margins in inches
_HISTOGRAM_HEIGHT = 2.6
_MOST_ROWS_WITH_NUMBERS = 40


def heat_map_cells(diagnosis: Diagnosis) -> tuple[list[str], list[str], list[list[float]]]:
    """Return rows (layer numbers), columns (module names) and the value of each cell.

    The first number in a name is its layer, the rest its module. The value is the mean over the
    models of residual fraction / noise level; without a base, of the largest angle in degrees.
    What is not there is nan.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for layer in diagnosis.layers:
        found.setdefault(_place(layer.name), []).extend(_values(layer))
    rows = sorted({row for row, _ in found}, key=lambda row: (not row, int(row or 0)))
    columns = list(dict.fromkeys(column for _, column in found))
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

    rows, columns, cells = heat_map_cells(diagnosis)
    inner = (max(_CELL_WIDTH * len(columns), 4.0), max(_CELL_HEIGHT * len(rows), 0.6))
    width = inner[0] + _LEFT + _RIGHT
    height = inner[1] + 2 * _TOP + _BOTTOM + _HISTOGRAM_HEIGHT + 0.6
    figure = Figure(figsize=(width, height), dpi=150)
    top = (height - _TOP - inner[1]) / height
    axes = figure.add_axes((_LEFT / width, top, inner[0] / width, inner[1] / height))
    image = _draw_cells(axes, rows, columns, cells, relative=diagnosis.base is not None)
    bar = figure.add_axes(((width - 0.95) / width, top, 0.15 / width, inner[1] / height))
    figure.colorbar(image, cax=bar)
    box = (_LEFT / width, 0.6 / height, inner[0] / width, _HISTOGRAM_HEIGHT / height)
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


def _values(layer: LayerGeometry) -> list[float]:
    models = [model for model in layer.models if model is not None]
    if layer.base_norm is None:
        return [model.largest_angle for model in models]
    return [model.over_noise for model in models if model.over_noise is not None]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _draw_cells(
    axes: Any, rows: Sequence[str], columns: Sequence[str], cells: list[list[float]], relative: bool
) -> Any:
    axes.set_facecolor("0.85")
    limits = {"vmin": 0.0, "vmax": 1.2} if relative else {}
    colours = "RdYlBu" if relative else "Blues"
    image = axes.imshow(cells, cmap=colours, aspect="auto", **limits)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", size=8)
    axes.set_yticks(range(len(rows)), rows, size=8)
    axes.set_ylabel("layer", size=9)
    title = "residual / noise level (0: rotation, 1: noise)" if relative else "largest angle, °"
    axes.set_title(title, size=10)
    if len(rows) <= _MOST_ROWS_WITH_NUMBERS:
        for at, line in enumerate(cells):
            for column, value in enumerate(line):
                text = "" if math.isnan(value) else f"{value:.2f}" if relative else f"{value:.1f}"
                axes.text(column, at, text, size=7, ha="center", va="center")
    return image


def _draw_angles(axes: Any, diagnosis: Diagnosis) -> None:
    """Draw one outline per model over all layers; planes below the first edge are not drawn."""
    for at, origin in enumerate(diagnosis.models):
        models = [layer.models[at] for layer in diagnosis.layers]
        counts = [model.angle_counts for model in models if model is not None]
        total = [sum(column) for column in zip(*counts, strict=True)] or [0] * len(ANGLE_EDGES)
        axes.stairs(total[1:], ANGLE_EDGES, label=f"{at + 1}: {Path(origin).name}", linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlim(ANGLE_EDGES[0], ANGLE_EDGES[-1])
    axes.set_xlabel("rotation angle in degrees (log scale)", size=9)
    axes.set_ylabel("planes", size=9)
    axes.set_title("angles of the rotations, all layers", size=10)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
