"""Execute a plan: several threads over tensors, admitted under a memory budget, stoppable.

Reading ahead is left to the kernel (each task announces the tensors of the tasks after it);
writing behind is the sink's. Nothing here knows a file format or a merge method.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from orthomerge.checkpoints.writer import MemoryWriter, TensorSink
from orthomerge.linalg.precision import full_precision
from orthomerge.merging.batching import batched_tasks
from orthomerge.merging.executors import Context, Interrupted, run_tasks
from orthomerge.merging.norms import UpdateNorms
from orthomerge.merging.observing import MergedModule
from orthomerge.merging.plan import Plan, Task
from orthomerge.merging.surveys import model_survey

__all__ = ["Interrupted", "execute", "measure_spectra", "one_thread_per_worker", "run_observed"]


def execute(
    plan: Plan, sink: TensorSink, *, advance: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Run every task that the sink does not already hold.

    Args:
        plan: What to do.
        sink: Where results go; its ``finished`` tensors are skipped.
        advance: Progress: called from any thread with input bytes as they are read.

    Returns:
        Output tensor name to the details its executor returned, for all tasks of the plan.

    Raises:
        Interrupted: On Ctrl-C, after the tensors in work have been left in a state to resume.
        OrthoMergeError: The first failure; the other threads are stopped.
    """
    context = Context(plan, sink, advance or (lambda _: None))
    done = {
        task.name: sink.finished[task.name] for task in plan.tasks if task.name in sink.finished
    }
    for task in plan.tasks:
        if task.name in done:
            context.advance(task.read_bytes)
    # Largest first: the threads then finish at about the same time.
    waiting = [task for task in plan.tasks if task.name not in done]
    waiting.sort(key=lambda task: -task.read_bytes)
    with _prepared(context):
        done |= _run_all(waiting, context)
    return done


@contextmanager
def _prepared(context: Context, *, matched: bool = True) -> Iterator[None]:
    """Set up the arithmetic, and what is known of the whole model before the first task.

    Args:
        context: Gets the survey and, if ``matched``, the factor of a norm-matched strength.
        matched: Whether that factor is needed: it takes a pass over the model.

    Raises:
        Interrupted: On Ctrl-C.
    """
    try:
        with full_precision(), torch.inference_mode(), one_thread_per_worker():
            context.survey = model_survey(context)
            if matched and context.plan.request.norm_matched is not None:
                context.factor = _matched_factor(context.plan, context)
            yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted from interrupt


def _matched_factor(plan: Plan, context: Context) -> float:
    """Run the merge once without writing, to learn how large its update is."""
    assert plan.request.norm_matched is not None
    norms = UpdateNorms()
    measured = replace(context, norms=norms, advance=lambda _: None, stop=threading.Event())
    _run_all(plan.merged_tasks, measured)
    return norms.factor(plan.request.norm_matched)


def measure_spectra(plan: Plan) -> dict[str, list[float]]:
    """Run the merge of a LoRA adapter without writing; return each module's singular values."""
    nowhere = MemoryWriter({})
    context = Context(plan, nowhere, spectra={})
    with _prepared(context, matched=False):
        _run_all([task for task in plan.tasks if task.kind == "factors"], context)
    assert context.spectra is not None
    return context.spectra


def run_observed(
    plan: Plan,
    observe: Callable[[MergedModule], None],
    *,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Run the merge of every LoRA module without writing, and show each to a function."""
    # What is measured of a module takes about as much memory again as merging it.
    tasks = [
        replace(task, peak_bytes=min(2 * task.peak_bytes, plan.budget_bytes))
        for task in plan.tasks
        if task.kind == "factors"
    ]
    context = Context(plan, MemoryWriter({}), advance or (lambda _: None))
    with _prepared(context):
        context.observe = observe
        _run_all(tasks, context)


def _run_all(tasks: Sequence[Task], context: Context) -> dict[str, Any]:
    budget = _Budget(context.plan.budget_bytes)
    batches = batched_tasks(tasks, context.plan)
    done: dict[str, Any] = {}

    def work(position: int) -> None:
        batch = batches[position]
        with budget.admitted(sum(task.peak_bytes for task in batch)), torch.inference_mode():
            context.check_stop()
            _prefetch(batches, position + context.plan.workers, context)
            for task, details in zip(batch, run_tasks(batch, context), strict=True):
                if not context.measuring:
                    for partner in task.partners:  # so that a finished task has all its outputs
                        context.sink.finish(partner.name, {})
                    context.sink.finish(task.name, details)
                done[task.name] = details

    with ThreadPoolExecutor(context.plan.workers, thread_name_prefix="orthomerge") as pool:
        futures = [pool.submit(work, position) for position in range(len(batches))]
        try:
            _wait(futures, context)
        finally:
            context.stop.set()
            for future in futures:
                future.cancel()
    return done


def _wait(futures: list[Future[None]], context: Context) -> None:
    """Wait for all tasks; on the first failure stop the others and raise it."""
    finished, _ = wait(futures, return_when="FIRST_EXCEPTION")
    context.stop.set()
    failures = [f.exception() for f in finished if not f.cancelled() and f.exception()]
    # A thread stopped because of another's failure is not the cause.
    causes = [failure for failure in failures if not isinstance(failure, Interrupted)]
    for failure in causes or failures:
        assert failure is not None
        raise failure


class _Budget:
    """Admits tasks while the sum of their working memory stays within a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._free = limit_bytes
        self._changed = threading.Condition()

    @contextmanager
    def admitted(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


def _prefetch(batches: Sequence[Sequence[Task]], position: int, context: Context) -> None:
    if position < len(batches):
        for checkpoint, name in context.checkpoints(batches[position][0]):
            if name is not None and name in checkpoint.tensors:
                checkpoint.prefetch(name)


@contextmanager
def one_thread_per_worker() -> Iterator[None]:
    """Give each worker one torch thread: pieces are too small to share, and pools only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
