"""Carry a plan through to its output: a published folder or file, or tensors in memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters.config import CONFIG_NAME
from orthomerge.adapters.memory import AdapterState
from orthomerge.checkpoints.staging import Staging
from orthomerge.checkpoints.writer import MemoryWriter, StreamingWriter
from orthomerge.errors import (
    AdapterError,
    CheckpointError,
    NumericalError,
    OutputError,
    VerificationError,
)
from orthomerge.linalg.devices import require_device
from orthomerge.merging.engine import execute, run_observed
from orthomerge.merging.observing import MergedModule
from orthomerge.merging.plan import Plan
from orthomerge.merging.planning.planner import check_output
from orthomerge.merging.provenance import final_metadata, provenance_files, source_digests
from orthomerge.merging.settling import settled
from orthomerge.merging.verifying import verify_output

if TYPE_CHECKING:
    import torch

__all__ = ["MergeResult", "observe_plan", "run_plan"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge produced.

    Args:
        plan: What was done.
        output: The published file or folder; None for a merge in memory.
        tensors: The merged tensors of a merge in memory.
        seconds: Wall-clock time of the run.
        resumed_tensors: How many tensors an earlier run had finished.
        details: Per output tensor, what its executor reported.
    """

    plan: Plan
    output: Path | None
    tensors: dict[str, torch.Tensor] | None
    seconds: float
    resumed_tensors: int = 0
    details: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def adapter(self) -> AdapterState | None:
        """The merged PEFT adapter of a merge in memory, for ``adapters`` and PEFT itself."""
        config = self.plan.written_files.get(CONFIG_NAME)
        if self.tensors is None or config is None:
            return None
        return AdapterState(self.tensors, json.loads(config), "merged adapter")

    @property
    def rotations(self) -> dict[str, dict[str, float]]:
        """What was measured of each merged OFT module."""
        return {k: d["rotation"] for k, d in self.details.items() if "rotation" in d}

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What a method of whole tensors measured of each."""
        return {k: d["facts"] for k, d in self.details.items() if d.get("facts")}


def run_plan(
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
) -> MergeResult:
    """Execute a plan and publish its output, whole or not at all.

    Args:
        plan: From ``build_plan``.
        resume: Continue an interrupted run of the same plan.
        overwrite: Replace an existing output.
        advance: Progress, in input bytes.

    Raises:
        Interrupted: On Ctrl-C; the partial output stays for ``resume``.
        NumericalError: A tensor is not finite; no partial output stays.
        CheckpointError: An input is damaged; no partial output stays.
        VerificationError: The written file does not say what was merged; nothing is published.
        BudgetError: The disk is full (the partial output stays for ``resume``), or there is no
            such device (nothing was started).
    """
    started = time.monotonic()
    require_device(plan.request.device)
    plan = settled(plan)
    if plan.request.output is None:
        outputs = [info for task in plan.tasks for info in task.outputs]
        memory = MemoryWriter({info.name: info for info in outputs})
        details = execute(plan, memory, advance=advance)
        _check_inputs(plan)
        elapsed = time.monotonic() - started
        return MergeResult(plan, None, memory.tensors, elapsed, details=details)
    check_output(plan, overwrite=overwrite)
    sources = [*([plan.base] if plan.base else []), *plan.models]
    fingerprints = [source.checkpoint.fingerprint() for source in sources]
    output = plan.request.output
    staging = Staging(output, plan.hash(), fingerprints, resume=resume, overwrite=overwrite)
    details, resumed = _write(plan, staging, advance)
    elapsed = time.monotonic() - started
    return MergeResult(plan, output, None, elapsed, resumed, details)


def observe_plan(
    plan: Plan,
    observe: Callable[[MergedModule], None],
    *,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Run the merge of every LoRA module without writing, and show each to a function.

    Modules are read and merged as the merge itself would do it, under the same memory budget.

    Args:
        plan: A plan with tasks of low-rank factors.
        observe: Called once per module, in any order and from any thread.
        advance: Progress: called from any thread with input bytes as they are read.

    Raises:
        OrthoMergeError: As the merge itself would.
    """
    require_device(plan.request.device)
    run_observed(plan, observe, advance=advance)
    _check_inputs(plan)


def _write(
    plan: Plan, staging: Staging, advance: Callable[[int], None] | None
) -> tuple[dict[str, Any], int]:
    writer = StreamingWriter(plan.layout, staging)
    try:
        details = execute(plan, writer, advance=advance)
        _check_inputs(plan)
        _publish(plan, writer, details)
    except OutputError:
        writer.abandon()
        raise
    except (NumericalError, CheckpointError, AdapterError, VerificationError):
        writer.abandon(discard=True)  # the inputs have to change, so there is nothing to resume
        raise
    except BaseException:
        writer.abandon()
        raise
    return details, len(writer.finished)


def _publish(plan: Plan, writer: StreamingWriter, details: dict[str, Any]) -> None:
    digests = source_digests(plan, details) if plan.request.provenance else []
    single_file = plan.output_kind == "file"
    files = {name: path.read_bytes() for name, path in plan.copied_files.items()}
    files |= {name: text.encode() for name, text in plan.written_files.items()}
    if plan.request.provenance and not single_file:
        files |= {name: t.encode() for name, t in provenance_files(plan, digests).items()}
    metadata = final_metadata(plan, digests) if single_file else None

    def check(path: Path) -> None:
        verify_output(path, plan, details)

    writer.publish(files, single_file=single_file, metadata=metadata, check=check)


def _check_inputs(plan: Plan) -> None:
    for source in [*plan.models, *([plan.base] if plan.base else [])]:
        source.checkpoint.check_unchanged()
        source.checkpoint.close()
