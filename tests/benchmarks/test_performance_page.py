"""The performance page says what the result files say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_tables_are_those_of_the_result_files(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import performance_page

    page = performance_page.PAGE.read_text("utf-8")
    assert page == performance_page.rendered(page), "run benchmarks/performance_page.py"
    assert page.count("<!-- table:") == len(performance_page._TABLES)
    tables = re.findall(r"<!-- table: \w+ -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert all(table.count("\n") >= 3 for table in tables)


def test_a_changed_number_is_noticed(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import performance_page

    page = performance_page.PAGE.read_text("utf-8")
    changed = re.sub(r"\| orthomerge-linear \| \d", "| orthomerge-linear | 9", page)
    assert changed != page
    assert performance_page.rendered(changed) == page
    assert "performance_page" in sys.modules
