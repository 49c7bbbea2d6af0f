"""Read a written output back and compare it with what was merged, before it is published.

An adapter is read through its own config, as any program will: a wrong scale, rank or name is found
here and not by whoever loads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orthomerge.adapters.sources import open_source
from orthomerge.checkpoints.dtypes import torch_dtype
from orthomerge.errors import VerificationError
from orthomerge.linalg.factors import Factors
from orthomerge.merging.plan import Plan, Task

__all__ = ["verify_output"]

_ROUNDINGS = 8  # of the stored dtype, or of the float32 it is read in


def verify_output(path: Path, plan: Plan, details: Mapping[str, Any]) -> None:
    """Compare every merged LoRA module of a written output with the norm of what was merged.

    Args:
        path: The complete output, not yet in its place.
        plan: What was done.
        details: What the executors reported.

    Raises:
        VerificationError: A module's norm differs by more than rounding.
    """
    tasks = [task for task in plan.tasks if task.kind == "factors"]
    if not tasks:
        return
    names = plan.lora.names if plan.lora else {}
    source = open_source(path)
    try:
        for task in tasks:
            expected = float(details[task.name]["written_norm"])
            if source.lora is None:
                stored = source.checkpoint.read(task.name)
                found = torch.linalg.vector_norm(stored.float(), dtype=torch.float64).item()
                size = expected
            else:
                name = names[next(name for name in task.models if name)]
                factors = Factors(*source.lora.factors(name, torch.float32))
                found = factors.norm().item()
                size = float(factors.B.norm() * factors.A.norm())
            eps = max(torch.finfo(torch_dtype(task.info.dtype)).eps, torch.finfo(torch.float32).eps)
            tolerance = max(_ROUNDINGS * eps * size, 1e-30)
            if not math.isclose(found, expected, rel_tol=0, abs_tol=tolerance):
                raise _differs(task, plan, expected, found)
    finally:
        source.checkpoint.close()


def _differs(task: Task, plan: Plan, expected: float, found: float) -> VerificationError:
    return VerificationError(
        "what was written does not read back as what was merged",
        file=plan.request.output,
        tensor=task.name,
        expected=f"norm {expected:.6g}",
        found=f"{found:.6g}",
        remedy="Nothing was published. Check the disk, then run the merge again.",
    )
