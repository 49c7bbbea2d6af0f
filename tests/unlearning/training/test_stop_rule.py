"""When a run stops, what it keeps, and that it never keeps what is beyond the bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unlearn_runs import request, run

from orthomerge.errors import RecipeError
from orthomerge.unlearning.training import Level, Reading, StopRule, Verdict
from orthomerge.unlearning.training.callbacks import UnlearnCallback

START = Reading(0, 0.1, 0.2)
LEVEL = Level(2.0, 0.25, "holdout")


def rule(**changes: Any) -> StopRule:
    options = {"level": LEVEL, "tolerance": 1.0, "max_retain_rise": 0.3, "start": START}
    return StopRule(**{**options, **changes})


def test_it_stops_at_the_first_reading_at_the_level_and_keeps_it():
    one = rule()
    assert one.judge(Reading(1, 1.0, 0.2)) == Verdict(keep=True)
    verdict = one.judge(Reading(2, 2.0, 0.2))
    assert (verdict.keep, verdict.stop, verdict.back) == (True, True, False)
    assert verdict.reason == "the forget loss reached the holdout level at step 2"
    assert one.warnings == []


def test_a_lower_forget_loss_than_the_best_is_not_kept():
    one = rule()
    assert one.judge(Reading(1, 1.0, 0.2)).keep
    assert not one.judge(Reading(2, 0.9, 0.1)).keep
    assert one.best == Reading(1, 1.0, 0.2)


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (Reading(3, 2.2501, 0.2), "step 3 went beyond the holdout level: forget loss 2.250"),
        (Reading(3, 1.5, 0.5001), "step 3 raised the retain loss by 0.300, more than 0.3"),
    ],
)
def test_beyond_a_bound_a_step_is_taken_back_with_a_warning(reading, words):
    one = rule()
    verdict = one.judge(reading)
    assert (verdict.keep, verdict.stop, verdict.back) == (False, False, True)
    assert one.best is None
    assert one.warnings == [verdict.reason]
    assert words in verdict.reason
    assert verdict.reason.endswith("taken back, learning rate halved")


def test_the_bounds_themselves_are_allowed():
    assert rule().judge(Reading(1, 2.25, 0.5)).keep


def test_after_so_many_setbacks_it_stops_with_the_best_step_before():
    one = rule(setbacks=2)
    one.judge(Reading(1, 1.0, 0.2))
    verdicts = [one.judge(Reading(step, 5.0, 0.2)) for step in (2, 3, 4)]
    assert [v.back for v in verdicts] == [True, True, False]
    assert [v.stop for v in verdicts] == [False, False, True]
    assert one.best == Reading(1, 1.0, 0.2)
    assert one.warnings[-1].endswith("the best step before is kept")


def test_without_level_or_guard_nothing_stops_it():
    one = rule(level=None, max_retain_rise=None)
    assert all(not one.judge(Reading(i, float(i), 100.0)).stop for i in range(1, 50))
    assert one.best == Reading(49, 49.0, 100.0)
    assert rule(start=Reading(0, 0.1, None)).judge(Reading(1, 1.0, None)).keep


losses = st.floats(0, 4, allow_nan=False)
readings = st.lists(st.tuples(losses, losses | st.none()), min_size=1, max_size=25)


@given(readings, losses, st.floats(0, 1), st.floats(0, 3), st.floats(0.01, 2) | st.none())
def test_whatever_is_measured_what_is_kept_is_the_best_that_is_allowed(
    measured, loss, deviation, tolerance, rise
):
    level = Level(loss, deviation, "gold")
    one = rule(level=level, tolerance=tolerance, max_retain_rise=rise)

    def allowed(reading: Reading) -> bool:
        drifted = rise is not None and reading.retain is not None
        steady = not drifted or reading.retain - START.retain <= rise
        return steady and reading.forget <= loss + tolerance * deviation

    seen, kept, backs, stopped = [], None, 0, False
    for step, (forget, retain) in enumerate(measured, 1):
        reading = Reading(step, forget, retain)
        verdict = one.judge(reading)
        seen.append(reading)
        assert verdict.keep <= allowed(reading)
        assert verdict.back <= (not allowed(reading))
        backs += verdict.back
        kept = reading if verdict.keep else kept
        if verdict.stop:
            stopped = True
            break
    good = [reading for reading in seen if allowed(reading)]
    assert kept == one.best == (max(good, key=lambda r: r.forget) if good else None)
    assert backs <= one.setbacks
    assert len(one.warnings) == len(seen) - len(good)
    reached = bool(good) and good[-1] is seen[-1] and good[-1].forget >= loss
    assert stopped == (reached or len(seen) - len(good) > one.setbacks)


@given(readings, st.integers(0, 25))
def test_its_state_continues_it(measured, cut):
    whole, first = rule(), rule()
    items = [Reading(step, *pair) for step, pair in enumerate(measured, 1)]
    expected = [whole.judge(reading) for reading in items]
    found = [first.judge(reading) for reading in items[:cut]]
    second = rule()
    second.restore(first.state())
    first.warnings.append("not shared")
    found += [second.judge(reading) for reading in items[cut:]]
    assert found == expected
    assert second == whole


@pytest.fixture
def watched(monkeypatch):
    """What the weights, the best snapshot and the learning rates were after every decision."""
    seen: list[dict[str, Any]] = []
    obey = UnlearnCallback._obey

    def noted(self: Any, verdict: Any, step: int, control: Any) -> None:
        before = self.best
        obey(self, verdict, step, control)
        groups = self.trainer.optimizer.param_groups
        now = {n: p.detach().clone() for n, p in self.trainer.model.named_parameters()}
        now = {n: p for n, p in now.items() if n in self.start.tensors}
        seen.append({"verdict": verdict, "weights": now, "good": before or self.start,
                     "rates": {group["lr"] for group in groups}})  # fmt: skip

    monkeypatch.setattr(UnlearnCallback, "_obey", noted)
    return seen


def test_a_step_that_goes_too_far_is_taken_back_and_the_rate_halved(facts, tmp_path, watched):
    asked = request(
        facts, tmp_path / "out", projection="off", train__learning_rate=0.03,
        train__max_steps=12, stop__level="auto", stop__evaluate_every=1, stop__max_retain_rise=0.4,
        stop__tolerance=0.1,
    )  # fmt: skip
    steps: list[Any] = []
    result = run(asked, report=steps.append)
    rate, backs = 0.03, 0
    for seen in watched:
        if seen["verdict"].back:
            rate, backs = rate / 2, backs + 1
            for name, tensor in seen["good"].tensors.items():
                assert tensor.equal(seen["weights"][name])
        assert seen["rates"] == {rate}
    assert 1 <= backs <= 4
    assert len(result.warnings) >= backs
    # What is written is what was kept, not where it ended.
    best = max((s for s in steps if s.verdict.keep), key=lambda s: s.reading.forget)
    assert result.kept == best.step
    forget, retain = result.table[:2]
    assert forget.loss_after == pytest.approx(best.reading.forget, rel=1e-5)
    assert (
        forget.loss_after
        <= result.report["level"]["loss"] + 0.1 * result.report["level"]["deviation"]
    )
    assert retain.loss_after <= retain.loss_before + 0.4 + 1e-6


def test_the_gold_models_loss_is_the_level_where_there_is_one(facts, tmp_path):
    """Here the gold model is the model itself: there is nothing to forget then."""
    asked = request(facts, tmp_path / "out", stop__level="auto", stop__gold=str(facts / "model"))
    with pytest.raises(RecipeError, match="already at the gold level"):
        run(asked)
    assert list(tmp_path.iterdir()) == []
    asked = request(facts, tmp_path / "out", projection="off", train__max_steps=20,
                    stop__evaluate_every=1, stop__level=0.5)  # fmt: skip
    result = run(asked)
    assert result.report["level"] == {"loss": 0.5, "deviation": 0.0, "source": "given"}
