"""The engine: memory admission, interruption, first failure, devices, surveys."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from orthomerge import merge, plan
from orthomerge.checkpoints.writer import MemoryWriter
from orthomerge.errors import BudgetError, NumericalError
from orthomerge.merging import engine
from orthomerge.merging.engine import Interrupted, execute
from orthomerge.merging.executors import EXECUTORS


def models(count: int = 2, tensors: int = 6, size: int = 4000):
    return [
        {f"layers.{i}.w": torch.full((size,), float(m + i)) for i in range(tensors)}
        for m in range(count)
    ]


def sink_for(prepared):
    return MemoryWriter({task.name: task.info for task in prepared.tasks})


def test_admitted_memory_never_exceeds_the_budget() -> None:
    budget = engine._Budget(100)
    lock, used, most = threading.Lock(), 0, 0

    def work() -> None:
        nonlocal used, most
        with budget.admitted(40):
            with lock:
                used += 40
                most = max(most, used)
            time.sleep(0.002)
            with lock:
                used -= 40

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 80


def test_tasks_run_under_the_plans_budget(monkeypatch) -> None:
    admitted = []

    class Spy(engine._Budget):
        @contextmanager
        def admitted(self, nbytes):
            admitted.append(nbytes)
            with super().admitted(nbytes):
                yield

    monkeypatch.setattr(engine, "_Budget", Spy)
    prepared = plan(models())
    execute(prepared, sink_for(prepared))
    assert sorted(admitted) == sorted(task.peak_bytes for task in prepared.tasks)


def test_finished_tensors_are_not_done_again(monkeypatch) -> None:
    prepared = plan(models(), method="linear")
    sink = sink_for(prepared)
    sink.finished = {"layers.0.w": {"digests": []}, "layers.3.w": {"digests": []}}
    done = []
    original = EXECUTORS["merge"]

    def spy(task, context):
        done.append(task.name)
        return original(task, context)

    monkeypatch.setitem(EXECUTORS, "merge", spy)
    seen = []
    execute(prepared, sink, advance=seen.append)
    assert sorted(done) == ["layers.1.w", "layers.2.w", "layers.4.w", "layers.5.w"]
    assert sum(seen) == prepared.read_bytes


def test_first_failure_stops_the_others_and_is_raised() -> None:
    bad = models()
    bad[1]["layers.2.w"][17] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.2\.w"):
        merge(bad, run_settings={"workers": 3})


def test_ctrl_c_becomes_interrupted_and_stops_the_workers(monkeypatch) -> None:
    def wait_is_interrupted(futures, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "wait", wait_is_interrupted)
    prepared = plan(models())
    with pytest.raises(Interrupted):
        execute(prepared, sink_for(prepared))


def test_unusable_device_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(BudgetError, match="cuda"):
        merge(models(), run_settings={"device": "cuda"})


def test_torch_threads_are_restored() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        merge(models(), run_settings={"workers": 2})
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_progress_counts_every_input_byte() -> None:
    seen: list[int] = []
    base, *tuned = models(3, size=300_000)
    result = merge(tuned, base=base, method="task-arithmetic", advance=seen.append)
    assert sum(seen) == result.plan.read_bytes == 3 * 6 * 300_000 * 4


def test_pieces_do_not_change_the_result(monkeypatch) -> None:
    from orthomerge.merging.planning import draft

    generator = torch.Generator().manual_seed(0)
    base, *tuned = [{"w": torch.randn(5000, generator=generator)} for _ in range(3)]
    settings = {"base": base, "method": "ties", "density": 0.3}
    whole = merge(tuned, **settings).tensors["w"]
    monkeypatch.setattr(draft, "_CPU_PIECE", 37)
    assert torch.equal(merge(tuned, **settings).tensors["w"], whole)
