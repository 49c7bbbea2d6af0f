"""What every executor is given, and the steps they share: open, round once, check, write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orthomerge.checkpoints.dtypes import ITEM_SIZES, torch_dtype
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.reader import Checkpoint
from orthomerge.checkpoints.writer import TensorSink
from orthomerge.merging.draws import Draws
from orthomerge.merging.norms import UpdateNorms
from orthomerge.merging.observing import MergedModule
from orthomerge.merging.plan import Plan, Task
from orthomerge.merging.spaces import Space
from orthomerge.merging.streams import TensorReader, check_finite

__all__ = ["Context", "Interrupted"]


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked to stop
    """The run was asked to stop; what is finished has been kept."""


@dataclass
class Context:
    """A running merge.

    Args:
        plan: What is being done.
        sink: Where results go.
        advance: Called with the number of input bytes read since the last call.
        stop: Set when the run must end soon.
        survey: Result of the method's whole-model survey, if it has one.
        norms: Set while only the size of the updates is measured and nothing is written.
        spectra: Set while only singular values are measured: module to its values, descending.
        observe: Set while modules are only shown to a function: see ``observing``.
        factor: Multiplies every update, see ``UpdateNorms``.
    """

    plan: Plan
    sink: TensorSink
    advance: Callable[[int], None] = lambda _: None
    stop: threading.Event = field(default_factory=threading.Event)
    survey: Any = None
    norms: UpdateNorms | None = None
    spectra: dict[str, list[float]] | None = None
    observe: Callable[[MergedModule], None] | None = None
    factor: float = 1.0

    @property
    def measuring(self) -> bool:
        """Whether nothing is written in this pass."""
        return any(what is not None for what in (self.norms, self.spectra, self.observe))

    @property
    def device(self) -> torch.device:
        """Where the arithmetic runs."""
        return torch.device(self.plan.request.device)

    @property
    def compute(self) -> torch.dtype:
        """dtype of the arithmetic."""
        return torch_dtype(self.plan.compute_dtype)

    def checkpoints(self, task: Task) -> list[tuple[Checkpoint, str | None]]:
        """Return each source with the task's tensor in it: base first, then the models."""
        base = [(self.plan.base.checkpoint, task.base)] if self.plan.base else []
        models = [(m.checkpoint, n) for m, n in zip(self.plan.models, task.models, strict=True)]
        return [*base, *models]

    def draws(self, task: Task, positions: Sequence[int]) -> Draws:
        """Return a task's random numbers, for the models at these positions."""
        keys = self.plan.model_keys
        method = task.method or self.plan.method.name
        # A LoRA module's own name: how it is stored, and whether in a base, does not matter.
        name = task.module if task.kind == "factors" else task.name
        return Draws(self.plan.request.seed, method, name, [keys[at] for at in positions])

    def reader(
        self,
        checkpoint: Checkpoint,
        name: str,
        *,
        hashing: bool = False,
        piece_elements: int | None = None,
    ) -> TensorReader:
        """Open a tensor for reading in pieces."""
        size = piece_elements or self.plan.piece_elements
        hashing = hashing and self.plan.request.provenance
        return TensorReader(checkpoint, name, self.compute, self.device, size, hashing=hashing)

    def check_stop(self) -> None:
        """Raise ``Interrupted`` if the run must end."""
        if self.stop.is_set():
            raise Interrupted

    def finish(
        self,
        task: Task,
        start: int,
        merged: Tensor,
        origin: Tensor | None,
        contributions: Sequence[Tensor],
        space: Space,
    ) -> None:
        """Measure or write a merged piece, its update scaled to the strength asked for."""
        if self.norms is not None:
            assert origin is not None
            deltas = contributions
            if space is Space.WEIGHT:
                deltas = [weight - origin for weight in contributions]
            self.norms.add(merged - origin, deltas, origin)
        else:
            averaged = task.method is not None and task.parameters.get("normalize")
            if self.factor != 1.0 and not averaged:  # as trained heads are
                assert origin is not None
                merged = torch.lerp(origin, merged, self.factor)
            self.emit(task.info, start, merged)

    def emit(self, info: TensorInfo, start: int, values: Tensor) -> None:
        """Round a piece once to the output dtype, check it, and write it.

        Raises:
            NumericalError: The merged values are not finite, or overflow the output dtype.
        """
        rounded = values.to(torch_dtype(info.dtype))
        output = str(self.plan.request.output or "the result")
        remedy = "Choose an output dtype with more range, e.g. bfloat16, or a smaller strength."
        check_finite(rounded.to(self.compute), output, info.name, "the merged tensor", remedy)
        raw = rounded.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.sink.write(info.name, start * ITEM_SIZES[info.dtype], raw.data)
