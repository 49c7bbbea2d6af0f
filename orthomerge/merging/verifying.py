"""Read a written output back and compare it with what was merged, before it is published.

An adapter is read through its own config, as any program will: a wrong scale, rank or name is found
here and not by whoever loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.sources import Source, open_source
from orthomerge.checkpoints.dtypes import torch_dtype
from orthomerge.errors import VerificationError
from orthomerge.linalg.factors import Factors
from orthomerge.linalg.sketching import sketch
from orthomerge.merging.engine import one_thread_per_worker
from orthomerge.merging.plan import Plan, Task

__all__ = ["verify_output"]

_ROUNDINGS = 8  # of the stored dtype, or of the float32 it is read in


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
    if source.lora is None:
        wanted = torch.tensor(details["written_norm"], dtype=torch.float64)
        stored = source.checkpoint.read(task.name)
        found = torch.linalg.vector_norm(stored.float(), dtype=torch.float64)
        size = wanted.item()
    else:
        assert plan.lora is not None
        wanted = torch.tensor(details["written_sketch"], dtype=torch.float64)
        name = plan.lora.names[next(name for name in task.models if name)]
        factors = Factors(*source.lora.factors(name, torch.float32))
        found = sketch(factors)
        size = float(factors.B.norm() * factors.A.norm())
    eps = max(torch.finfo(torch_dtype(task.info.dtype)).eps, torch.finfo(torch.float32).eps)
    tolerance = max(_ROUNDINGS * eps * size, 1e-30)
    if not torch.linalg.vector_norm(found - wanted).item() <= tolerance:  # NaN is refused
        raise _differs(task, plan, wanted, found)


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
