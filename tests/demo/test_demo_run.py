"""The demo's folder, its commands and its errors; end to end it runs once, small."""

from __future__ import annotations

import json
import shlex
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orthomerge.demo import DemoResult, run_demo
from orthomerge.demo.evaluation import load_adapter, load_full, predict
from orthomerge.demo.merges import MergeCommandError, MergeJob, merge_jobs, run_merges
from orthomerge.demo.results import FULL_EXPERTS, FULL_MERGES, GROUPS, OFT_EXPERTS, OFT_MERGES
from orthomerge.errors import MissingExtraError, OutputError


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec

    def without_sklearn(name: str, *rest: Any) -> Any:
        return None if name == "sklearn" else find(name, *rest)

    monkeypatch.setattr(util, "find_spec", without_sklearn)
    with pytest.raises(MissingExtraError, match=r"'scikit-learn'.*orthomerge\[demo\]"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="thesis"):
        run_demo(tmp_path, overwrite=overwrite)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "thesis.tex"]


def test_an_earlier_demo_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(OutputError, match="--overwrite"):
        run_demo(tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}"


def test_the_commands_can_be_typed_and_write_to_places_of_their_own() -> None:
    jobs = merge_jobs(["noisy", "blurred"])
    for job in jobs:
        assert shlex.split(job.command) == ["orthomerge", *job.arguments]
    assert len({job.output for job in jobs}) == len(jobs)
    assert len({(job.group, job.name) for job in jobs}) == len(jobs)


def test_a_failing_command_is_shown_with_what_it_said(tmp_path: Path) -> None:
    job = MergeJob("none", FULL_MERGES, ("nowhere",), ("--method", "linear"), "merges/none")
    with pytest.raises(MergeCommandError, match="nowhere") as caught:
        run_merges([job], tmp_path)
    assert caught.value.exit_code == 3
    assert caught.value.command == "orthomerge merge nowhere --method linear -o merges/none"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    lines: list[str] = []
    out = tmp_path_factory.mktemp("demo")
    result = run_demo(out, quick=True, say=lines.append)
    assert any(line.startswith("$ orthomerge merge ") for line in lines)
    return result


@pytest.mark.slow
def test_the_table_has_every_row(result: DemoResult) -> None:
    domains = list(result.columns[1:])
    names = {group: [row.name for row in result.rows if row.group == group] for group in GROUPS}
    assert names["base"] == ["base"]
    assert names[FULL_EXPERTS] == names[OFT_EXPERTS] == [f"{name} expert" for name in domains]
    jobs = merge_jobs(domains)
    for group in (FULL_MERGES, OFT_MERGES):
        assert names[group] == [job.name for job in jobs if job.group == group]
    for row in result.rows:
        assert tuple(row.accuracy) == result.columns
        assert row.mean == pytest.approx(np.mean([row.accuracy[name] for name in domains]))


@pytest.mark.slow
def test_experts_beat_the_base_where_they_were_trained(result: DemoResult) -> None:
    base = result.rows[0].accuracy
    assert base["clean"] > 0.7
    for row in result.rows:
        if row.group in (FULL_EXPERTS, OFT_EXPERTS):
            domain = row.name.removesuffix(" expert")
            assert row.accuracy[domain] > base[domain] + 0.05


@pytest.mark.slow
def test_every_merge_loads_and_differs_from_the_base(result: DemoResult) -> None:
    base = load_full(result.out / "base").state_dict()
    for row in result.rows:
        if row.model.command and not row.model.adapter:
            merged = load_full(result.out / row.model.path).state_dict()
            assert merged.keys() == base.keys()
            assert any(not merged[name].equal(base[name]) for name in base)
            assert merged["classifier.weight"].allclose(base["classifier.weight"], atol=1e-6)


@pytest.mark.slow
def test_the_merged_adapter_and_the_merged_checkpoint_are_one_model(result: DemoResult) -> None:
    from orthomerge.demo.data import load_digits

    images = load_digits(seed=0).test.images
    adapter = load_adapter(result.out / "base", result.out / "merges" / "oft-orthomerge-adapter")
    full = load_full(result.out / "merges" / "oft-orthomerge")
    base = load_full(result.out / "base")
    np.testing.assert_array_equal(predict(adapter, images), predict(full, images))
    assert (predict(full, images) != predict(base, images)).any()
    folded = adapter.merge_and_unload().state_dict()
    for name, tensor in full.state_dict().items():
        assert tensor.allclose(folded[name], atol=1e-5), name


@pytest.mark.slow
def test_the_folder_can_be_played_with(result: DemoResult) -> None:
    found = json.loads(result.json_path.read_text(encoding="utf-8"))
    assert len(found["rows"]) == len(result.rows)
    assert found["settings"]["quick"] is True
    for path in (result.markdown_path, result.png_path):
        assert path.stat().st_size > 500
    for row in result.rows:
        config = "adapter_config.json" if row.model.adapter else "config.json"
        assert (result.out / row.model.path / config).is_file()
    adapter = json.loads((result.out / "experts/oft/blurred/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "base"
