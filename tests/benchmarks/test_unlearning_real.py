"""The benchmark on real text writes every field at a tiny size; its numbers are not judged here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process import the scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_topics_stay_in_one_set_and_no_row_is_in_two() -> None:
    from python_topics import SIZES, topic_rows

    rows = topic_rows(SIZES["full"])
    topics = [{row["topic"] for row in found} for found in rows.values()]
    texts = [" ".join(row["text"].split()) for found in rows.values() for row in found]
    assert len(set.union(*topics)) == sum(map(len, topics))
    assert len(set(texts)) == len(texts)
    assert [len(rows[name]) for name in ("forget", "retain", "holdout")] == [48, 160, 48]
    assert topic_rows(SIZES["full"]) == rows
    assert topic_rows(SIZES["full"], seed=1) != rows


def test_what_was_lost_is_read_off_at_the_level() -> None:
    from unlearning_real import rise_at_level

    before = {"forget": 1.0, "retain": 2.0}
    log = [
        {"measured": {"forget": 2.0, "retain": 2.1}},
        {"measured": None},
        {"measured": {"forget": 4.0, "retain": 2.5}},
        {"measured": {"forget": 5.0, "retain": 9.0}},
    ]
    assert rise_at_level(log, before, 3.0) == pytest.approx(0.3)
    assert rise_at_level(log, before, 1.5) == pytest.approx(0.05)
    assert math.isnan(rise_at_level(log, before, 6.0))


def test_benchmark_runs_at_a_tiny_size(tmp_path, monkeypatch) -> None:
    import unlearning_real
    from unlearning_real_tables import real_text_table

    several = [{"objective": "npo", "alpha": 1.0, "projection": name} for name in ("off", "gu")]
    output = tmp_path / "result.json"
    words = ["unlearning_real.py", "--size", "tiny", "--seeds", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(unlearning_real, "arms", lambda: several)
    unlearning_real.main()
    result = json.loads(output.read_text())
    assert {"machine", "versions", "command", "threads"} <= set(result)
    assert result["rows"] == {"forget": 8, "retain": 24, "holdout": 8}
    for run in result["runs"]:
        assert run["steps"] == 2
        assert run["table"]["forget"]["loss_before"] < run["level"]
        assert not run["reached"]
    first, second = result["runs"]
    assert first["table"]["forget"] != second["table"]["forget"]
    table = real_text_table(result)
    assert len(table) == 4
    assert "| npo | 1 | gu |" in table[-1]
    assert "not reached (1 of 1)" in table[-1]
    first["retain_rise_at_level"] = 0.25
    assert "| +0.250 |" in real_text_table(result)[2]
    result["runs"] += [{**first, "retain_rise_at_level": 0.75}]
    assert "+0.500 (+0.250 to +0.750)" in real_text_table(result)[2]
