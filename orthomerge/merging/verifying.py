"""Read a written output back and compare it with what was merged, before it is published.

An adapter is read through its own config, as any program will: a wrong scale, rank or name is found
here and not by whoever loads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.sources import Source, open_source
from orthomerge.errors import VerificationError
from orthomerge.linalg.factors import Factors
from orthomerge.linalg.sketching import sketch
from orthomerge.merging.engine import one_thread_per_worker
from orthomerge.merging.plan import Plan, Task
from orthomerge.merging.streams import TensorReader

__all__ = ["verify_output"]

_ROUNDINGS = 8  # of the float32 it is read in; what is compared has been rounded before


def verify_output(path: Path, plan: Plan, details: Mapping[str, Any]) -> None:
    """Compare every merged LoRA module of a written output with what was merged.

    An adapter's modules by their sketches, full weights by their norms.

    Args:
        path: The complete output, not yet in its place.
        plan: What was done.
        details: What the executors reported.

    Raises:
        VerificationError: A module differs by more than rounding.
    """
    tasks = [task for task in plan.tasks if task.kind == "factors"]
    if not tasks:
        return
    source = open_source(path)
    try:
        with one_thread_per_worker(), ThreadPoolExecutor(plan.workers) as pool:
            for _ in pool.map(lambda task: _verify(task, source, plan, details[task.name]), tasks):
                pass
    finally:
        source.checkpoint.close()


def _verify(task: Task, source: Source, plan: Plan, details: Mapping[str, Any]) -> None:
    """Compare one module, an adapter's by its sketch, a full weight by its norm."""
    check = _check_weight if source.lora is None else _check_module
    wanted, found, size = check(task, plan, source, details)
    tolerance = max(_ROUNDINGS * torch.finfo(torch.float32).eps * size, 1e-30)
    if not torch.linalg.vector_norm(found - wanted).item() <= tolerance:  # NaN is refused
        raise _differs(task, plan, wanted, found)


def _check_module(
    task: Task, plan: Plan, source: Source, details: Mapping[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Return the sketches of a module as it was rounded and as it is read, and its size."""
    assert source.lora is not None
    names = plan.lora.names if plan.lora else {}
    factors = Factors(*source.lora.factors(names[task.module], torch.float32))
    wanted = torch.tensor(details["written_sketch"], dtype=torch.float64)
    return wanted, sketch(factors), float(factors.B.norm() * factors.A.norm())


def _check_weight(
    task: Task, plan: Plan, source: Source, details: Mapping[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Return the norms of a weight as it was rounded and as it is read, a piece at a time."""
    device, size = torch.device("cpu"), plan.piece_elements
    reader = TensorReader(source.checkpoint, task.name, torch.float32, device, size)
    square = 0.0
    for start in range(0, reader.numel, size):
        piece = reader.unchecked(start, min(size, reader.numel - start))
        square += torch.linalg.vector_norm(piece, dtype=torch.float64).item() ** 2
    norms = (details["written_norm"], math.sqrt(square))
    wanted, found = (torch.tensor(norm, dtype=torch.float64) for norm in norms)
    return wanted, found, wanted.item()


def _differs(task: Task, plan: Plan, wanted: Tensor, found: Tensor) -> VerificationError:
    norms = [torch.linalg.vector_norm(values).item() for values in (wanted, found)]
    return VerificationError(
        "what was written does not read back as what was merged",
        file=plan.request.output,
        tensor=task.name,
        expected=f"norm {norms[0]:.6g}",
        found=f"{norms[1]:.6g}",
        remedy="Nothing was published. Check the disk, then run the merge again.",
    )
