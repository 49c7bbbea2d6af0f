"""The demo's chart: a heat map with a row for each model and a column for each kind of image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from orthomerge.demo.results import DemoResult, DemoRow

__all__ = ["draw_chart"]

_TITLE_ROWS = 1.0  # left free above each group
_WHITE_TEXT_FROM = 0.55  # accuracy from which a cell is too dark for black text
_COLOURS = "Blues"
_ROW_INCHES = 0.3
_COLUMN_INCHES = 1.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 2.3, 1.1, 0.95, 0.25  # margins in inches


def draw_chart(result: DemoResult) -> None:
    """Draw the accuracies in per cent and save them as PNG.

    The figure is made without pyplot: no window, no state shared with the caller's own plots.
    """
    from matplotlib.figure import Figure

    columns = [*result.columns, "mean of\nthe domains"]
    groups = [list(rows) for _, rows in groupby(result.rows, key=lambda row: row.group)]
    rows_high = len(result.rows) + _TITLE_ROWS * len(groups)
    inner = (_COLUMN_INCHES * len(columns), _ROW_INCHES * rows_high)
    width, height = inner[0] + _LEFT + _RIGHT, inner[1] + _TOP + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=150)
    box = (_LEFT / width, _BOTTOM / height, inner[0] / width, inner[1] / height)
    axes = figure.add_axes(box)
    image = _draw_groups(axes, groups)
    _label_columns(axes, columns, rows_high)
    bar = figure.add_axes((1 - 0.85 / width, box[1], 0.15 / width, box[3]))
    figure.colorbar(image, cax=bar, label="test accuracy in %")
    figure.suptitle("Test accuracy in %, by model and kind of image", y=1 - 0.12 / height, va="top")
    figure.savefig(result.png_path)


def _draw_groups(axes: Any, groups: Sequence[Sequence[DemoRow]]) -> Any:
    """Draw one block of cells for each group, top to bottom, with the group's title above it."""
    ticks: list[float] = []
    labels: list[str] = []
    top = 0.0
    image = None
    for rows in groups:
        axes.text(-0.5, top + 0.7, rows[0].group, weight="bold", size=9, va="center")
        top += _TITLE_ROWS
        image = _draw_block(axes, rows, top)
        ticks += [top + index + 0.5 for index in range(len(rows))]
        labels += [row.name for row in rows]
        top += len(rows)
    axes.set_yticks(ticks, labels, size=9)
    return image


def _draw_block(axes: Any, rows: Sequence[DemoRow], top: float) -> Any:
    values = [[*row.accuracy.values(), row.mean] for row in rows]
    right = len(values[0]) - 0.5
    image = axes.imshow(
        [[100 * value for value in line] for line in values],
        extent=(-0.5, right, top + len(rows), top),
        cmap=_COLOURS,
        vmin=0,
        vmax=100,
        aspect="auto",
    )
    for index, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if value >= _WHITE_TEXT_FROM else "black"
            place = (column, top + index + 0.5)
            axes.text(*place, f"{100 * value:.1f}", color=colour, size=9, ha="center", va="center")
    axes.vlines(right - 1, top, top + len(rows), color="white", linewidth=3)
    return image


def _label_columns(axes: Any, columns: Sequence[str], rows_high: float) -> None:
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(rows_high, 0)
    axes.set_xticks(range(len(columns)), columns, size=9)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.spines[:].set_visible(False)
