"""An interrupted run, continued, ends as if it had not been interrupted: bit for bit on a CPU."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from unlearn_runs import content, leftovers, request, run

from orthomerge.errors import OutputError, ResumeError
from orthomerge.unlearning.training.checkpointing import latest_point, save_point
from orthomerge.unlearning.training.saving import StepLog

CASES: dict[str, dict[str, Any]] = {
    "lora-gu-bank": {},
    "lora-gu-history": {"projection": "gu-cheap", "objective": "grad-diff"},
    "full-off": {"projection": "off", "adapter__kind": "full", "train__learning_rate": 5e-4},
    "full-gru": {
        "projection": "gru", "train__optimizer": "sgd",
        "adapter__kind": "full", "objective": "simnpo", "train__learning_rate": 0.05,
    },
    "oft-gu": {"adapter__kind": "oft", "adapter__block_size": 8, "train__learning_rate": 1e-2},
    "pdu": {
        "objective": "pdu", "projection": "off",
        "parameters": {"tolerance": 0.02, "dual_step": 3.0, "warmup_epochs": 1.0},
    },
    "rmu": {"objective": "rmu", "parameters": {"steering": 4.0, "seed": 5}},
    "kl-accumulated": {
        "loss__retain_loss": "kl", "train__batch_size": 2, "train__accumulation": 2,
        "train__optimizer": "sgd", "train__learning_rate": 0.5, "data__retain_per_forget": 2,
    },
}  # fmt: skip


class Killed(BaseException):
    pass


def killer(step: int):
    def report(told: Any) -> None:
        if told.step == step:
            raise Killed

    return report


def copier(source: Any, target: Any, step: int):
    """Keep what is on the disk when a step is reported: all that kill -9 would leave."""

    def report(told: Any) -> None:
        if told.step == step:
            shutil.copytree(source, target)

    return report


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_one_that_was_not_interrupted(case, facts, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kept = copier(tmp_path / "whole.partial", tmp_path / "broken.partial", 3)
    expected = run(request(facts, whole, **CASES[case]), report=kept)
    # A run that is killed while it saves leaves a point that does not count.
    torn = tmp_path / "broken.partial" / "work" / "checkpoint-3"
    shutil.copytree(torn.with_name("checkpoint-2"), torn)
    (torn / "orthomerge.pt").unlink()
    seen = []
    found = run(request(facts, broken, **CASES[case]), resume=True, report=seen.append)
    assert [told.step for told in seen] == [3, 4]
    assert found.table == expected.table
    assert content(broken) == content(whole)
    assert leftovers(tmp_path) == {"whole", "broken"}
    assert expected.table[0].loss_after != expected.table[0].loss_before


def test_a_step_that_was_taken_back_and_the_best_step_survive_an_interruption(facts, tmp_path):
    changes = {
        "train__learning_rate": 0.03, "stop__level": 1.0, "stop__evaluate_every": 1,
        "stop__max_retain_rise": 0.4, "train__max_steps": 8, "projection": "off",
    }  # fmt: skip
    whole = run(request(facts, tmp_path / "whole", **changes))
    assert any("taken back" in warning for warning in whole.warnings)
    with pytest.raises(Killed):
        run(request(facts, tmp_path / "broken", **changes), report=killer(5))
    assert leftovers(tmp_path) == {"whole", "broken.partial"}
    run(request(facts, tmp_path / "broken", **changes), resume=True)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def test_before_the_first_point_it_starts_anew(facts, tmp_path):
    changes = {"train__max_steps": 3, "projection": "off", "train__save_every": 50}
    whole = run(request(facts, tmp_path / "whole", **changes))
    with pytest.raises(Killed):
        run(request(facts, tmp_path / "broken", **changes), report=killer(2))
    seen = []
    run(request(facts, tmp_path / "broken", **changes), resume=True, report=seen.append)
    assert [told.step for told in seen] == [1, 2, 3]
    assert whole.steps == 3
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


@pytest.fixture
def interrupted(facts, tmp_path):
    """A run of its own copy of the inputs, killed after the point at step 2."""
    own = tmp_path / "inputs"
    shutil.copytree(facts, own)
    changes = {"projection": "off"}
    with pytest.raises(Killed):
        run(request(own, tmp_path / "out", **changes), report=killer(3))
    return own


@pytest.mark.parametrize(
    "what", ["recipe", "seed", "forget rows", "holdout rows", "weights", "tokenizer"]
)
def test_what_has_changed_since_is_refused(what, interrupted, tmp_path):
    changes: dict[str, Any] = {"projection": "off"}
    if what == "recipe":
        changes["train__learning_rate"] = 1e-3
    elif what == "seed":
        changes["seed"] = 1
    elif what.endswith("rows"):
        name = interrupted / f"{what.partition(' ')[0]}.jsonl"
        name.write_text(name.read_text().replace("live?", "live now?"))
    elif what == "weights":
        path = interrupted / "model" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path = interrupted / "model" / "tokenizer.json"
        path.write_text(path.read_text() + " ")
    before = sorted(p.name for p in (tmp_path / "out.partial" / "work").iterdir())
    with pytest.raises(ResumeError):
        run(request(interrupted, tmp_path / "out", **changes), resume=True)
    assert sorted(p.name for p in (tmp_path / "out.partial" / "work").iterdir()) == before
    run(request(interrupted, tmp_path / "out", **changes), overwrite=True)  # starts afresh
    assert leftovers(tmp_path) == {"inputs", "out"}


def test_what_a_run_left_is_neither_overwritten_nor_made_up(interrupted, tmp_path):
    asked = request(interrupted, tmp_path / "out", projection="off")
    with pytest.raises(OutputError, match=r"--resume to continue it or --overwrite"):
        run(asked)
    other = request(interrupted, tmp_path / "other", projection="off")
    with pytest.raises(ResumeError, match="no interrupted run"):
        run(other, resume=True)
    point = tmp_path / "out.partial" / "work" / "checkpoint-2" / "orthomerge.pt"
    point.write_bytes(point.read_bytes()[:100])
    with pytest.raises(ResumeError, match=r"cannot be read.*--overwrite instead of --resume"):
        run(asked, resume=True)


def test_the_newest_complete_point_counts_by_number_and_the_others_go(tmp_path):
    for step in (8, 9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 11:
            save_point(tmp_path / f"checkpoint-{step}", {"objective": {}})
    (tmp_path / "checkpoint-11" / "orthomerge.pt.partial").write_bytes(b"half")
    found = latest_point(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()
    assert latest_point(tmp_path / "missing") is None


def test_a_torn_line_of_the_log_is_dropped(tmp_path):
    log = StepLog(tmp_path / "log")
    for step in (1, 2, 3):
        log.append({"step": step, "inner": {"x": 1}})
    text = log.text()
    (tmp_path / "log").write_text(text[:-2])  # ends with a brace all the same
    assert (tmp_path / "log").read_text().endswith("}")
    assert StepLog(tmp_path / "log", after=2).text() == "".join(text.splitlines(True)[:2])
    assert StepLog(tmp_path / "log").text() == ""


def test_dropout_is_drawn_as_if_there_had_been_no_interruption(facts, tmp_path):
    """Random numbers of the loop continue where they were, whatever was measured before."""
    own = tmp_path / "inputs"
    shutil.copytree(facts, own)
    config = own / "model" / "config.json"
    config.write_text(
        config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.3')
    )
    assert "0.3" in config.read_text()
    kept = copier(tmp_path / "whole.partial", tmp_path / "broken.partial", 3)
    run(request(own, tmp_path / "whole"), report=kept)
    run(request(own, tmp_path / "broken"), resume=True)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")
