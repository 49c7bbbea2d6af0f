"""The picture: what is in which cell, and what stands in its way."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from test_geometry import oft

from orthomerge.diagnostics.geometry import diagnose
from orthomerge.diagnostics.plots import heat_map_cells, plot_diagnosis
from orthomerge.errors import MissingExtraError, OutputError


@pytest.fixture
def diagnosis():
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{at}.mlp.up.weight" for at in (10, 2)]
    names += ["model.layers.2.mlp.down.weight", "head.weight"]
    base = {name: torch.randn(6, 6, generator=generator) for name in names}
    first = {k: W + 0.1 * torch.randn(6, 6, generator=generator) for k, W in base.items()}
    return diagnose([first, base], base)


def test_cells_are_sorted_by_layer_and_module(diagnosis) -> None:
    rows, columns, cells = heat_map_cells(diagnosis, 0)
    assert rows == ["–", "2", "10"] or rows == ["2", "10", "–"]
    assert columns == ["mlp.up", "mlp.down", "head"]
    by_name = {layer.name: layer.models[0].over_noise for layer in diagnosis.layers}
    at = rows.index("2")
    assert cells[at][0] == by_name["model.layers.2.mlp.up.weight"]
    assert cells[at][1] == by_name["model.layers.2.mlp.down.weight"]
    assert math.isnan(cells[at][2])
    assert cells[rows.index("10")][0] == by_name["model.layers.10.mlp.up.weight"]
    assert cells[rows.index("–")][2] == by_name["head.weight"]


def test_unchanged_models_have_no_value(diagnosis) -> None:
    _, _, cells = heat_map_cells(diagnosis, 1)
    assert all(math.isnan(value) for line in cells for value in line)


def test_the_file_is_an_image_of_the_kind_named(diagnosis, tmp_path) -> None:
    from matplotlib.image import imread

    pixels = imread(plot_diagnosis(diagnosis, tmp_path / "plot.png"))
    assert min(pixels.shape[:2]) > 400
    assert pixels[..., :3].std() > 0.05
    assert b"<svg" in plot_diagnosis(diagnosis, tmp_path / "plot.svg").read_bytes()


def test_adapters_without_a_base_show_angles(tmp_path) -> None:
    p = 0.1 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).numpy()
    found = diagnose([oft(tmp_path / "a", p, 2 * p)])
    rows, columns, cells = heat_map_cells(found, 0)
    assert (rows, columns) == (["0", "1"], ["up"])
    assert cells[1][0] == found.layers[1].models[0].largest_angle
    assert plot_diagnosis(found, tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["plot.docx", "plot", "nowhere/plot.png"])
def test_places_that_cannot_be_written_are_refused(diagnosis, tmp_path, name) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        plot_diagnosis(diagnosis, tmp_path / name)


def test_matplotlib_is_an_extra(diagnosis, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        plot_diagnosis(diagnosis, tmp_path / "plot.png")
