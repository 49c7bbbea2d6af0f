"""What a run of unlearning is told: plain values; the defaults are in the recipe's schema.

Nothing is loaded or checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from orthomerge.unlearning.objectives import Objective

__all__ = [
    "AdapterSettings",
    "DataSettings",
    "StopSettings",
    "TrainSettings",
    "UnlearnRequest",
]


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What is trained.

    Attributes:
        kind: A LoRA or OFT adapter, or all weights.
        rank: Rank of a LoRA adapter.
        alpha: Its scale is ``alpha / rank``.
        block_size: Side of an OFT adapter's rotation blocks.
        targets: ``all-linear``, or the last names of the modules.
    """

    kind: Literal["lora", "oft", "full"]
    rank: int
    alpha: float
    block_size: int
    targets: str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How rows become examples.

    Attributes:
        max_length: Most tokens of an example.
        template: ``chat``, ``plain``, or ``auto``: the tokenizer's chat template if it has one.
        keys: Names of the columns, where they are not the usual ones.
        retain_per_forget: Retain rows in a step for each forget row.
        retain_check: Share of the retain rows that is kept from training, to measure drift on.
    """

    max_length: int
    template: Literal["auto", "chat", "plain"]
    keys: Mapping[str, str]
    retain_per_forget: int
    retain_check: float


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How steps are taken.

    Attributes:
        learning_rate: None lets the kind of training decide.
        max_steps: Most optimizer steps.
        batch_size: Forget rows of one pass.
        accumulation: Passes of one optimizer step.
        optimizer: ``adamw`` or ``sgd``.
        weight_decay: Decoupled decay per step, times the learning rate.
        max_grad_norm: The gradient is clipped to this norm; 0 does not clip.
        warmup_steps: Steps over which the learning rate rises from zero.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast, or ``auto``.
        gradient_checkpointing: Trade time for memory.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: Seed of everything that is drawn.
        save_every: Steps between the points a run can be resumed from.
    """

    learning_rate: float | None
    max_steps: int
    batch_size: int
    accumulation: int
    optimizer: Literal["adamw", "sgd"]
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    gradient_checkpointing: bool
    device: str
    seed: int
    save_every: int


@dataclass(frozen=True, slots=True)
class StopSettings:
    """When it is enough.

    Attributes:
        level: Mean forget loss (nats per token) to stop at; ``auto`` takes the gold model's or else
            the holdout's, ``none`` runs all steps.
        gold: Folder of a model that never saw the forget set.
        tolerance: How far beyond the level a step may still be kept, in standard deviations of the
            rows' losses that the level is the mean of.
        max_retain_rise: Most that the mean retain loss may rise, nats per token; None for no guard.
        evaluate_every: Steps between measurements; None lets the number of steps decide.
        rows: Most rows of a set that are measured during training.
    """

    level: float | Literal["auto", "none"]
    gold: str | None
    tolerance: float
    max_retain_rise: float | None
    evaluate_every: int | None
    rows: int


@dataclass(frozen=True)
class UnlearnRequest:
    """One run.

    Attributes:
        model: Folder of the model, or a hub name.
        forget: File or folder of the forget set.
        retain: Of the retain set, or None.
        holdout: Of rows like the forget set's that the model never saw, or None.
        objective: The bound objective.
        projection: Settings of the projection; None does not project.
        bank_rows: Most retain rows that the projection's bank covers.
        output: Folder to make.
        record: The settings that determine the result, JSON-ready, for the provenance.
    """

    model: str
    forget: str
    retain: str | None
    holdout: str | None
    objective: Objective
    projection: Mapping[str, Any] | None
    bank_rows: int
    adapter: AdapterSettings
    data: DataSettings
    train: TrainSettings
    stop: StopSettings
    output: Path
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measured_every(self) -> int:
        """Steps between measurements."""
        return self.stop.evaluate_every or max(1, self.train.max_steps // 100)
