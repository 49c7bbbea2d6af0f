"""The table, the numbers and the chart, from made-up rows; no model is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orthomerge.demo.chart import draw_chart
from orthomerge.demo.report import write_report
from orthomerge.demo.results import BASE, FULL_EXPERTS, FULL_MERGES, DemoResult, DemoRow, MadeModel


def _row(name: str, group: str, command: str = "") -> DemoRow:
    model = MadeModel(name, group, f"merges/{name}", command=command, seconds=1.234)
    return DemoRow(model, {"clean": 0.9, "noisy": 0.5, "blurred": 0.25}, 0.375)


@pytest.fixture
def result(tmp_path: Path) -> DemoResult:
    rows = (
        _row("base", BASE),
        _row("noisy expert", FULL_EXPERTS),
        _row("linear", FULL_MERGES, "orthomerge merge a b -o c"),
    )
    return DemoResult(
        out=tmp_path,
        columns=("clean", "noisy", "blurred"),
        rows=rows,
        settings={"seed": 0},
        versions={"python": "3"},
        stages={"merging": 1.5, "measuring": 0.25},
    )


def test_the_json_holds_every_number(result: DemoResult) -> None:
    write_report(result)
    found = json.loads(result.json_path.read_text(encoding="utf-8"))
    assert found["columns"] == ["clean", "noisy", "blurred"]
    assert [row["name"] for row in found["rows"]] == ["base", "noisy expert", "linear"]
    assert found["rows"][2] == {
        "name": "linear",
        "group": FULL_MERGES,
        "accuracy": {"clean": 0.9, "noisy": 0.5, "blurred": 0.25},
        "mean": 0.375,
        "path": "merges/linear",
        "command": "orthomerge merge a b -o c",
        "seconds": 1.23,
    }
    assert found["total_seconds"] == 1.75


def test_the_table_has_a_line_for_each_row_and_group(result: DemoResult) -> None:
    write_report(result)
    text = result.markdown_path.read_text(encoding="utf-8")
    assert "| model | clean | noisy | blurred | mean |" in text
    assert "| linear | 90.0 | 50.0 | 25.0 | 37.5 |" in text
    assert f"| **{FULL_MERGES}** | | | | |" in text
    assert "$ orthomerge merge a b -o c" in text


def test_the_chart_is_a_picture_that_grows_with_the_rows(result: DemoResult) -> None:
    from matplotlib.image import imread

    draw_chart(result)
    height, width = imread(result.png_path).shape[:2]
    assert height > 300
    assert width > 900
