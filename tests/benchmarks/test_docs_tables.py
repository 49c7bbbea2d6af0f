"""The tables of the documentation say what the result files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def docs_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import docs_tables

    return docs_tables


def test_tables_are_those_of_the_result_files(docs_tables) -> None:
    shown = []
    for path in docs_tables.pages():
        page = path.read_text("utf-8")
        assert page == docs_tables.rendered(page), "run benchmarks/docs_tables.py"
        shown += re.findall(r"<!-- table: (\S+) -->", page)
        tables = re.findall(r"<!-- table: \S+ -->\n(.*?)<!-- end -->", page, re.DOTALL)
        assert all(table.count("\n") >= 3 for table in tables)
    assert sorted(shown) == sorted(docs_tables._TABLES)


def test_a_changed_number_is_noticed(docs_tables) -> None:
    page = (docs_tables.ROOT / "docs" / "performance.md").read_text("utf-8")
    changed = re.sub(r"\| orthomerge-linear \| \d", "| orthomerge-linear | 9", page)
    assert changed != page
    assert docs_tables.rendered(changed) == page
