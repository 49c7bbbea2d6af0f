"""The parts of the benchmark of retain drift, and the whole of it at a tiny size."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from unlearning import arms, crossing, descent, encoding, facts, pools, reporting  # noqa: E402
from unlearning.drift_tables import drift_table, limit_table  # noqa: E402

SMALL = facts.SIZES["S"]


@pytest.fixture(scope="module")
def world() -> facts.Facts:
    return facts.make_facts(SMALL, 3)


@pytest.fixture(scope="module")
def tokenizer(world: facts.Facts):
    return encoding.train_tokenizer([*world.grammar, *world.known])


def test_facts_are_a_pure_function_of_their_seed(world: facts.Facts) -> None:
    random.seed(1)
    before = random.getstate()
    assert facts.make_facts(SMALL, 3) == world
    assert random.getstate() == before
    other = facts.make_facts(SMALL, 4)
    for name, rows in world.named().items():
        assert rows != other.named()[name]


@pytest.mark.parametrize("size", ["S", "M"])
def test_sets_share_no_author_and_the_last_tenth_is_forgotten(size: str) -> None:
    made = facts.make_facts(facts.SIZES[size], 0)
    people = {name: {_subject(row) for row in rows} for name, rows in made.named().items()}
    sets = list(people.values())
    assert sum(map(len, sets)) == len(set().union(*sets))
    words = [word for name in sorted(set().union(*sets) - people["known"]) for word in name.split()]
    assert len(words) == len(set(words)), "a first or last name belongs to one person"
    authors = facts.SIZES[size].authors
    assert len(people["forget"]) == authors // 10
    assert len(made.forget) == authors == 10 * len(people["forget"])
    assert len(made.forget) + len(made.retain) == 10 * authors
    assert len(people["holdout"]) == facts.SIZES[size].holdout
    assert len(made.known) == 10 * len(pools.KNOWN) + len(pools.CAPITALS) == 130


def test_too_few_authors_are_refused() -> None:
    with pytest.raises(ValueError, match="a tenth of them is nobody"):
        facts.make_facts(facts.Size(9, 3, 1), 0)


def _subject(row: facts.Row) -> str:
    """Find whom a row is about, by undoing the question's form."""
    for pair in pools.FORMS.values():
        for form in pair:
            head, tail = form.split("{}")
            question = row["question"]
            if question.startswith(head) and question.endswith(tail):
                return question.removeprefix(head).removesuffix(tail)
    raise AssertionError(row)


def test_values_come_first_and_perturbed_answers_are_wrong(world: facts.Facts) -> None:
    values = {value for pool in pools.POOLS.values() for value in pool}
    values |= set(pools.CAPITALS.values())
    for row in (*world.forget, *world.retain, *world.known):
        (value,) = (v for v in values if row["answer"] in (f"{v}.", f"{v} it is."))
        assert row["paraphrased_answer"] == _other_form(row["answer"], value)
        assert row["paraphrased_question"] != row["question"]
        assert len(set(row["perturbed_answer"])) == 5
        for wrong in row["perturbed_answer"]:
            assert not wrong.startswith((f"{value}.", f"{value} it is."))
            assert wrong.endswith(" it is.") == row["paraphrased_answer"].endswith(" it is.")


def _other_form(answer: str, value: str) -> str:
    return f"{value} it is." if answer == f"{value}." else f"{value}."


def test_both_forms_are_taught_and_no_paraphrase_is(world: facts.Facts) -> None:
    every = [row for rows in world.named().values() for row in rows]
    taught = {row["question"] for row in every}
    assert not taught & {row["paraphrased_question"] for row in every}
    for pair in list(pools.FORMS.values())[:-1]:
        for form in pair:
            head = form.split("{}")[0]
            assert any(row["question"].startswith(head) for row in world.retain)


def test_capitals_are_real(world: facts.Facts) -> None:
    assert "Paris" in {
        row["answer"].removesuffix(" it is.").rstrip(".")
        for row in world.known
        if row["question"] in {form.format("France") for form in pools.FORMS["capital"]}
    }


def test_jsonl_comes_back(world: facts.Facts, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "forget.jsonl"
    facts.write_jsonl(path, world.forget)
    assert tuple(json.loads(line) for line in path.read_text("utf-8").splitlines()) == world.forget


def test_only_answers_are_scored(world: facts.Facts, tokenizer) -> None:
    assert len(tokenizer) == encoding.VOCABULARY
    rows = encoding.encode(world.forget, tokenizer)
    batch = encoding.collate(rows, [5, 0])
    assert batch["row"].tolist() == [5, 0]
    for i, place in enumerate((5, 0)):
        row, ids = world.forget[place], batch["input_ids"][i]
        text = tokenizer.decode(ids[batch["attention_mask"][i].bool()])
        assert text == f"{row['question']}\n{row['answer']}<eos>"
        scored = ids[batch["labels"][i] != -100]
        assert tokenizer.decode(scored) == f"{row['answer']}<eos>"
        assert torch.equal(scored, batch["labels"][i][batch["labels"][i] != -100])
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() == batch["input_ids"].shape[1]


def test_answers_are_mostly_value(world: facts.Facts, tokenizer) -> None:
    """What follows the value is the same for all: ``.`` or ``it is.``, and the end."""
    rows = [*world.forget, *world.retain]
    whole = sum(len(tokenizer.encode(row["answer"])) + 1 for row in rows)
    after = sum(4 if row["answer"].endswith(" it is.") else 2 for row in rows)
    assert 0.4 * whole < whole - after


def test_swapped_rows_keep_questions_and_exchange_all_answers(
    world: facts.Facts, tokenizer
) -> None:
    rows = encoding.encode(world.forget, tokenizer)
    mixed = arms.swapped(rows, 0)
    assert sorted(_answer(row) for row in mixed) == sorted(_answer(row) for row in rows)
    for i, (row, other) in enumerate(zip(rows, mixed, strict=True)):
        start = row.labels.count(-100)
        assert other.input_ids[:start] == row.input_ids[:start], i
        assert other.labels[:start] == row.labels[:start]
        assert len(other.input_ids) == len(other.labels)
        assert other.input_ids[start:] == _answer(other)
    assert sum(_answer(a) == _answer(b) for a, b in zip(rows, mixed, strict=True)) <= 2


def _answer(row: encoding.Encoded) -> tuple[int, ...]:
    return tuple(label for label in row.labels if label != -100)


def test_a_shuffled_loss_keeps_value_and_inner_products() -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(7, 3, requires_grad=True), torch.randn(20, requires_grad=True)]

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scale = batch["input_ids"].double()
        return sum((p.double() * scale).sin().sum() for p in parameters)

    mixed = arms.shuffled(loss, parameters, 0)
    batches = [{"input_ids": torch.tensor(scale)} for scale in (2.0, 3.0)]
    true = [torch.autograd.grad(loss(b), parameters) for b in batches]
    false = [torch.autograd.grad(mixed(b), parameters) for b in batches]
    for batch in batches:
        assert float(mixed(batch).detach()) == pytest.approx(float(loss(batch).detach()), rel=1e-6)
    for t in range(2):
        product = float((true[0][t] * true[1][t]).sum())
        assert float((false[0][t] * false[1][t]).sum()) == pytest.approx(product, rel=1e-5)
        assert not torch.equal(true[0][t], false[0][t])
        a, b = (torch.sort(gradients[0][t].flatten()).values for gradients in (true, false))
        torch.testing.assert_close(a, b)


def test_drift_is_measured_on_rows_without_gradients(world: facts.Facts, tokenizer) -> None:
    rows = encoding.encode(world.retain, tokenizer)
    split = descent.split_retain(rows, 1, 60)
    assert len(split.unused) == 60
    assert len(split.used) == len(rows) - 60
    assert not set(split.unused) & set(split.used)
    assert split == descent.split_retain(rows, 1, 60) != descent.split_retain(rows, 2, 60)
    assert len(descent.split_retain(rows, 1, 1000).unused) == len(rows) // 3


def test_every_row_comes_once_before_any_comes_twice() -> None:
    stream = descent._stream(10, 4, "seed")
    seen = [place for _ in range(5) for place in next(stream)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_the_bank_covers_its_rows_once(world: facts.Facts, tokenizer) -> None:
    rows = encoding.encode(world.retain, tokenizer)
    seen: list[int] = []

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(batch["row"].tolist())
        return batch["labels"].sum()

    sums = torch.ones(len(rows))
    groups = arms.Feed(rows, loss, (sums, sums)).groups(8, 100)
    weights = [weight for group in groups for _, weight in group()]
    assert len(groups) == 8
    assert sorted(seen) == list(range(100))
    assert sum(weights) == sum(len(_answer(row)) for row in rows[:100])


def test_the_crossing_of_a_hand_example() -> None:
    """From 1.0 to 2.0 the level 1.25 is a quarter of the way: 2.25 steps, drift 0.1 + 0.2 / 4."""
    forget, drift = [0.0, 0.5, 1.0, 2.0, 9.0], [0.0, 0.05, 0.1, 0.3, 7.0]
    place = crossing.at_level(forget, 1.25)
    assert place == pytest.approx(2.25)
    assert crossing.interpolated(drift, 2.25) == pytest.approx(0.15)
    assert crossing.at_level(forget, 9.0) == 4.0, "the last step counts"
    assert crossing.at_level(forget, 1.0) == 2.0
    assert crossing.at_level([3.0, 4.0], 1.0) == 0.0
    assert crossing.at_level(forget, 10.0) is None
    assert crossing.interpolated(drift, 4.0) == 7.0


def test_the_first_crossing_counts() -> None:
    assert crossing.at_level([0.0, 2.0, 0.0, 2.0], 1.0) == 0.5


def test_reductions_are_paired_by_seed() -> None:
    plain, guarded = {1: 0.2, 2: 0.4, 3: None, 4: 0.1}, {1: 0.1, 2: 0.3, 3: 0.1, 4: None}
    found = crossing.reductions(plain, guarded)
    assert found == {1: pytest.approx(0.5), 2: pytest.approx(0.25)}
    assert crossing.spread(found)["mean"] == 0.375
    assert crossing.spread({}) is None


def test_figures_are_rises_at_equal_forgetting() -> None:
    """The mean 2 is reached after 1.5 steps, when half of the rows are still known by heart."""
    curves = {
        "forget": [0.0, 1.0, 3.0, 4.0], "drift": [0.5, 0.6, 1.0, 3.0],
        "known": [0.1, 0.1, 0.3, 0.3], "exact": [1.0, 0.6, 0.4, 0.0],
        "cpu_seconds": [1.0, 3.0, 2.0],
    }  # fmt: skip
    found = reporting.cell_figures(curves, crossing.Goal(2.0, 0.1))
    assert found["steps"] == 1.5
    assert found["drift"] == pytest.approx(0.3)
    assert found["known_drift"] == pytest.approx(0.1)
    assert found["exact"] == 0.5
    assert found["even_steps"] == 2.75
    assert found["even_drift"] == pytest.approx(2.0)
    assert found["cpu_seconds_per_step"] == 2.0
    early = reporting.cell_figures(curves, crossing.Goal(3.5, 0.5))
    assert early["steps"] == early["even_steps"] == 2.5, "rows first, then the mean"
    never = reporting.cell_figures(curves, crossing.Goal(5.0, 1.0))
    assert never["drift"] is never["even_drift"] is None
    assert crossing.Goal(2.0, -1.0).places(curves["forget"], curves["exact"]) == (1.5, None)


def cell(drift: float | None, seconds: float = 1.0) -> dict[str, object]:
    even = None if drift is None else 2 * drift
    return {
        "drift": drift, "even_drift": even, "steps": 9.0, "exact": 0.5,
        "cpu_seconds_per_step": seconds,
    }  # fmt: skip


def test_strengths_are_chosen_on_the_other_seeds() -> None:
    """Weight 3 is best on seeds 2 and 3 only, so only seed 1 gets it: choosing is not peeking."""
    ones = {1: cell(0.2), 2: cell(0.3), 3: cell(0.3)}
    threes = {1: cell(0.9), 2: cell(0.1), 3: cell(0.1)}
    found = reporting._best_elsewhere({1.0: ones, 3.0: threes})
    assert [found[seed]["retain_weight"] for seed in (1, 2, 3)] == [3.0, 1.0, 1.0]
    assert [found[seed]["drift"] for seed in (1, 2, 3)] == [0.9, 0.3, 0.3]
    threes[2] = cell(None)
    found = reporting._best_elsewhere({1.0: ones, 3.0: threes})
    assert found[1]["retain_weight"] == 1.0, "a weight that never arrives is not chosen"


def test_tables_say_what_was_measured() -> None:
    cells = {"ga": {0.0: {"none": {1: cell(0.2), 2: cell(0.4)},
                          "bank": {1: cell(0.1, 3.0), 2: cell(None, 3.0)}}}}  # fmt: skip
    figures = reporting.part_figures(cells, ("none", "bank"), tuned=False)
    assert figures["ga 0"]["bank"]["reduction"]["by_seed"] == {"1": 0.5}
    assert figures["ga 0"]["bank"]["cost"] == 3.0
    rows = drift_table({"figures": figures})
    assert rows[2].startswith("| ga 0 | none | 300.0 |  | 50 | 600.0 |  |")
    assert rows[3].startswith("| ga 0 | bank | 100.0 (1 not reached) | 50 (50) | 50 | 200.0 |")
    limits = [
        {"target": "a", "at_least": 0.4, "at_most": None, "measured": 0.5, "met": True},
        {"target": "b", "at_least": -0.02, "at_most": 0.02, "measured": 0.05, "met": False},
    ]
    assert limit_table({"targets": limits})[2:] == [
        "| a | ≥ 40 | 50.0 | met |",
        "| b | -2 … 2 | 5.0 | **missed** |",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_program_runs_small(tmp_path: Path) -> None:
    """Three runs of four steps in a world of ten authors; their numbers are not judged."""
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "retain_drift.py"), "--quick", "--part", "smoke"]
    command += ["--cache", str(tmp_path / "cache"), "--results", str(result)]
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    assert "to do" not in done.stdout, "what is in the cache is not measured again"
    text = result.read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)
    arms_of = found["parts"]["smoke"]["figures"]["grad-diff 1"]
    assert set(arms_of) == {"none", "bank", "bank-shuffled"}
    runs = found["parts"]["smoke"]["runs"]["grad-diff"]["1"]
    starts = {(run["1"]["forget"][0], run["1"]["retain"][0]) for run in runs.values()}
    assert len(starts) == 1, "every arm starts from the same model and rows"
    ends = {run["1"]["forget"][1] for run in runs.values()}
    assert len(ends) == len(runs), "every arm does something else"
    assert_kept(tmp_path / "cache")


def assert_kept(cache: Path) -> None:
    """What is in the cache is not measured again, unless something differs."""
    import retain_drift

    part = retain_drift.quick(retain_drift.PARTS["smoke"])
    for seeds, done in (((1,), True), ((2,), False)):
        session = retain_drift.Session(cache, {"smoke": part}, seeds)
        assert {work.done for work in session.works()} == {done}


def test_parts_name_what_exists() -> None:
    from unlearning.parts import PARTS

    for part in PARTS.values():
        for setting in part.settings(1):
            assert setting.arm in arms.ARMS
            assert setting.method in arms.METHODS
        assert part.arms[0] == "none"
        assert part.size in facts.SIZES
