"""The plan of a merge: every task, every output byte's place, every file, before any work.

Plain data; built by ``planning`` from headers only and executed by ``engine``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orthomerge.adapters.lora_styles import LoraStyle
from orthomerge.adapters.memory import AdapterState
from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.layout import Layout
from orthomerge.checkpoints.sources import CheckpointSource
from orthomerge.merging.draws import model_keys
from orthomerge.merging.lora.ranks import RankRule
from orthomerge.merging.registry import MergeMethod
from orthomerge.version import __version__

if TYPE_CHECKING:
    from orthomerge.adapters.convention import OftConvention
    from orthomerge.adapters.updates import AdapterUpdates
    from orthomerge.merging.lora.output import LoraOutput

__all__ = [
    "AbsentPolicy",
    "BackMap",
    "Form",
    "MergeRequest",
    "MissingPolicy",
    "OutputKind",
    "Plan",
    "Task",
    "TaskKind",
]

MissingPolicy = Literal["error", "copy-base", "skip"]
BackMap = Literal["auto", "as_trained", "exact"]
AbsentPolicy = Literal["zero", "skip", "error"]
Form = Literal["auto", "full", "lora", "dora"]
OutputKind = Literal["folder", "file", "memory"]
TaskKind = Literal["merge", "whole", "copy", "convert", "rotate", "factors"]

#: The kinds whose tensors a method merges; the others are taken over from one source.
MERGED_KINDS: frozenset[TaskKind] = frozenset({"merge", "whole", "rotate", "factors"})

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class MergeRequest:
    """Everything a user can ask of one merge, as plain values.

    Args:
        models: The models to merge: paths, hub names, state dicts or adapters in memory.
        base: The model they were fine-tuned from.
        method: Method id; None lets the sources decide.
        weights: One value per model (scalar, gradient or rules); None for the default everywhere.
        parameters: Method parameters, each a scalar, gradient or rules.
        output: Where the result goes; None keeps it in memory.
        dtype: Output dtype for floating tensors; None keeps each tensor's own.
        compute_dtype: ``float32``, ``float64``, or None: fp64 if an input is fp64, else fp32.
        max_shard_bytes: Largest output file.
        missing: What to do with tensors that not every model has.
        back_map: How a merged OFT generator becomes a rotation.
        form: What is written for LoRA adapters: ``auto`` is an adapter without a base and a full
            checkpoint with one.
        rank: Rank of a merged LoRA adapter; None for lossless.
        style: Format of a merged LoRA adapter; ``auto`` is that of the adapters.
        component: Part of a pipeline that PEFT adapters belong to, for formats that say so.
        absent: What an adapter contributes to a module it does not change: ``zero`` counts it with
            its weight, ``skip`` leaves it out of sums and means, ``error`` refuses.
        heads: What becomes of whole tensors (trained heads) that several adapters carry:
            ``average``, ``error``, or ``keep:N`` for those of model N, from 1.
        assume_same_base: Take adapters that name different bases to be of one base.
        provenance: Whether to record how the output was made.
        memory_budget_bytes: Most working memory; None for half of what is free.
        device: Where the arithmetic runs.
        workers: Threads; None for one per core, at most 8.
        seed: Seed of methods that draw random numbers.
        norm_matched: Size of the whole update, as a multiple of the size of the sum of all
            models' changes; None leaves it as the method makes it.
        recipe: The user's settings as they should appear in the provenance.
    """

    models: tuple[CheckpointSource | AdapterState, ...]
    base: CheckpointSource | None = None
    method: str | None = None
    weights: tuple[Any, ...] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    missing: MissingPolicy = "error"
    back_map: BackMap = "auto"
    form: Form = "auto"
    rank: RankRule | None = None
    style: LoraStyle | Literal["auto"] = "auto"
    component: str | None = None
    absent: AbsentPolicy = "zero"
    heads: str = "average"
    assume_same_base: bool = False
    provenance: bool = True
    memory_budget_bytes: int | None = None
    device: str = "cpu"
    workers: int | None = None
    seed: int = 0
    norm_matched: float | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept_head(self) -> int | None:
        """Position of the model whose whole tensors ``heads`` keeps; None to keep none alone."""
        place = self.heads.partition(":")[2]
        return int(place) - 1 if place else None


@dataclass(frozen=True, slots=True)
class Task:
    """One output tensor and what it is made of.

    Args:
        info: Its name, dtype and shape in the output.
        kind: ``merge`` runs the method on pieces, ``whole`` on the whole tensor, ``copy`` copies
            the first source's bytes (and checks that the others agree), ``convert`` changes the
            first source's dtype, ``rotate`` merges one OFT module, ``factors`` one LoRA module.
        models: The tensor (or adapter's module) in each model; None where a model lacks it.
        base: The tensor in the base, if it takes part.
        weights: One per model.
        parameters: The method's parameters for this tensor.
        method: Set when another method than the plan's merges this tensor.
        peak_bytes: Working memory while it runs.
        read_bytes: Input bytes it reads.
        partners: Further outputs: of a LoRA module the factor B beside A.
        batch: Tasks of equal batch may run as one; None for alone.
    """

    info: TensorInfo
    kind: TaskKind
    models: tuple[str | None, ...]
    base: str | None
    weights: tuple[float, ...]
    parameters: Mapping[str, Any]
    peak_bytes: int
    read_bytes: int
    method: str | None = None
    partners: tuple[TensorInfo, ...] = ()
    batch: Hashable = None

    @property
    def name(self) -> str:
        """Name of the output tensor."""
        return self.info.name

    @property
    def module(self) -> str:
        """Path of the adapters' module it merges, for a task of modules; some model has it."""
        return next(name for name in self.models if name is not None)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Every tensor it makes, its own first."""
        return (self.info, *self.partners)


@dataclass(frozen=True)
class Plan:
    """A checked merge, ready to run.

    Args:
        request: What was asked.
        method: The method.
        models: Opened models.
        base: Opened base.
        changes: What each model that is an adapter changes in the base; None for the others, and
            in merges that never leave the adapters' own space.
        tasks: One per output tensor.
        layout: Where each output byte goes.
        output_kind: Folder, single file, or tensors in memory.
        copied_files: Files that go into the output folder: name to path.
        written_files: Files that are written anew: name to text.
        compute_dtype: safetensors name of the dtype the arithmetic uses.
        piece_elements: How many elements of a tensor are worked on at a time.
        convention: How merged OFT generators are stored or applied.
        budget_bytes: Working memory the engine may use.
        workers: Threads.
        survey_bytes: Working memory of a survey of the whole model, before any task.
        notes: What the user should know.
        lora: The merged LoRA adapter, if that is what is written.
    """

    request: MergeRequest
    method: MergeMethod
    models: tuple[Source, ...]
    base: Source | None
    changes: tuple[AdapterUpdates | None, ...]
    tasks: tuple[Task, ...]
    layout: Layout
    output_kind: OutputKind
    copied_files: Mapping[str, Path]
    written_files: Mapping[str, str]
    compute_dtype: str
    piece_elements: int
    convention: OftConvention | None
    budget_bytes: int
    workers: int
    survey_bytes: int
    notes: tuple[str, ...]
    lora: LoraOutput | None = None

    @property
    def merged_tasks(self) -> tuple[Task, ...]:
        """The tasks that the plan's own method merges."""
        return tuple(t for t in self.tasks if t.kind in MERGED_KINDS and t.method is None)

    @property
    def model_keys(self) -> tuple[str, ...]:
        """What tells the models' random numbers apart."""
        return model_keys(model.origin for model in self.models)

    @property
    def read_bytes(self) -> int:
        """Input bytes that are read."""
        return sum(task.read_bytes for task in self.tasks)

    @property
    def write_bytes(self) -> int:
        """Output bytes that are written."""
        return self.layout.nbytes

    @property
    def peak_bytes(self) -> int:
        """Largest working memory, beside the interpreter and its libraries."""
        largest = sorted((task.peak_bytes for task in self.tasks), reverse=True)
        return max(min(sum(largest[: self.workers]), self.budget_bytes), self.survey_bytes)

    @property
    def output_dtypes(self) -> dict[str, int]:
        """Output bytes per dtype, most first."""
        totals: dict[str, int] = {}
        for info in (info for task in self.tasks for info in task.outputs):
            totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def hash(self) -> str:
        """Return what identifies the result: a run is only resumed under an equal hash."""
        content = {
            "version": __version__,
            "method": self.method.name,
            "compute_dtype": self.compute_dtype,
            "piece_elements": self.piece_elements,
            "convention": repr(self.convention),
            "seed": self.request.seed,
            "drawn_for": self.model_keys if self.method.is_random else None,
            "norm_matched": self.request.norm_matched,
            "absent": self.request.absent,
            "heads": self.request.heads,
            "device": self.request.device,
            "output": self.output_kind,
            "adapters": [a.config.values for s in self.models if (a := s.lora or s.rotations)],
            "provenance": self.request.provenance and dict(self.request.recipe),
            "files": [sorted(self.copied_files), dict(self.written_files)],
            "shards": [
                [s.filename, s.header.decode("utf-8", "replace")] for s in self.layout.shards
            ],
            "tasks": [
                [t.name, t.kind, t.models, t.base, t.weights, dict(t.parameters), t.method]
                for t in self.tasks
            ],
        }
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
