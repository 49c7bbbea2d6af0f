"""The grammar of an unlearning recipe: what may be written, of which type, with which default.

Only the form is checked here; objectives and projections check their own parameters in
``unlearning``, which also turns a recipe into a run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

__all__ = ["ObjectiveOptions", "UnlearnRecipe"]


def _path(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) and value:
        return value
    raise ValueError("must be a path")


def _device(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        return value
    raise ValueError("must be auto, cpu, cuda or cuda:N")


def _level(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value in ("auto", "none") or (number and value > 0):
        return value
    raise ValueError("must be auto, none or a loss above 0")


PathText = Annotated[str, BeforeValidator(_path)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ObjectiveOptions(_Strict):
    """What is minimised, beside the objective's own parameters."""

    retain_loss: Literal["nll", "kl", "hidden", "none"] | None = Field(
        default=None, description="How the retain set is held; default: the objective's own."
    )
    forget_weight: NotNegative | None = Field(default=None, description="γ of γ L_f + α L_r.")
    retain_weight: NotNegative | None = Field(default=None, description="α of γ L_f + α L_r.")
    compat: bool = Field(default=False, description="Reproduce quirks of the published code.")


class AdapterOptions(_Strict):
    """What is trained."""

    kind: Literal["lora", "oft", "full"] = Field(default="lora", description="full: all weights.")
    rank: Count = Field(default=16, description="Rank of a LoRA adapter.")
    alpha: Positive = Field(default=32, description="Its scale is alpha / rank.")
    block_size: Annotated[int, Field(ge=2)] = Field(
        default=32, description="Side of an OFT adapter's rotation blocks."
    )
    targets: str | list[str] = Field(
        default="all-linear", description="all-linear, or the last names of the modules."
    )


class DataOptions(_Strict):
    """How rows become examples."""

    max_length: Annotated[int, Field(ge=4)] = Field(default=512, description="Tokens per example.")
    template: Literal["auto", "chat", "plain"] = Field(
        default="auto", description="auto: the tokenizer's chat template if it has one."
    )
    keys: dict[str, str] = Field(
        default_factory=dict, description="Column names that are not the usual ones."
    )
    retain_per_forget: Count = Field(default=1, description="Retain rows per forget row.")
    retain_check: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of retain rows kept from training, to measure drift."
    )


class TrainOptions(_Strict):
    """How steps are taken."""

    learning_rate: Positive | None = Field(
        default=None, description="Default: 1e-5 for all weights, 2e-4 for adapters."
    )
    max_steps: Count = Field(default=200, description="Most optimizer steps.")
    batch_size: Count = Field(default=8, description="Forget rows of one pass.")
    accumulation: Count = Field(default=1, description="Passes of one optimizer step.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="The optimizer.")
    weight_decay: NotNegative = Field(default=0.0, description="Decoupled weight decay.")
    max_grad_norm: NotNegative = Field(default=1.0, description="Clip to this norm; 0: do not.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="Linear warm-up.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 on a GPU that has it, else fp32."
    )
    gradient_checkpointing: bool = Field(default=False, description="Trade time for memory.")
    device: Annotated[str, BeforeValidator(_device)] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N."
    )
    save_every: Count = Field(default=50, description="Steps between points to resume from.")


class StopOptions(_Strict):
    """When it is enough."""

    level: Annotated[Any, BeforeValidator(_level)] = Field(
        default="auto",
        description="Forget loss to stop at: auto (the gold model's, else the holdout's), none, or "
        "nats per token.",
    )
    gold: PathText | None = Field(
        default=None, description="A model that never saw the forget set."
    )
    tolerance: NotNegative = Field(
        default=1.0, description="Standard deviations beyond the level that are still kept."
    )
    max_retain_rise: Positive | None = Field(
        default=0.3, description="Most rise of the retain loss, nats per token; null: no guard."
    )
    evaluate_every: Count | None = Field(
        default=None, description="Steps between measurements; default: a hundredth of max_steps."
    )
    rows: Annotated[int, Field(ge=4)] = Field(
        default=100, description="Most rows of a set that are measured."
    )


class NegationOptions(_Strict):
    """Forget without training: take away what a model learned of the forget set."""

    expert: PathText = Field(
        description="A model or adapter that was trained on what shall be forgotten."
    )
    strength: Positive = Field(default=1.0, description="How much of it is taken away.")


class UnlearnRecipe(_Strict):
    """One run of unlearning."""

    model: PathText = Field(description="Folder of the model, or org/name on the hub.")
    forget: PathText | None = Field(default=None, description="What shall be forgotten.")
    retain: PathText | None = Field(default=None, description="What shall be kept.")
    holdout: PathText | None = Field(
        default=None, description="Rows like the forget set's that the model never saw."
    )
    output: PathText | None = Field(default=None, description="Folder to make.")
    objective: str = Field(default="npo", description="Objective id, see methods list.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="The objective's own parameters."
    )
    loss: ObjectiveOptions = Field(default_factory=ObjectiveOptions)
    projection: dict[str, Any] = Field(
        default_factory=lambda: {"preset": "gu"},
        description="off, the name of a preset, or settings of the projection with preset.",
    )
    adapter: AdapterOptions = Field(default_factory=AdapterOptions)
    data: DataOptions = Field(default_factory=DataOptions)
    train: TrainOptions = Field(default_factory=TrainOptions)
    stop: StopOptions = Field(default_factory=StopOptions)
    negation: NegationOptions | None = Field(
        default=None, description="Forget without training instead."
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Seed of all that is drawn.")

    @field_validator("projection", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """Let a projection be written as the name of its preset; YAML reads off as false."""
        if value is False or value is None:
            return {"preset": "off"}
        if isinstance(value, str):
            return {"preset": value}
        if isinstance(value, Mapping):
            return {"preset": "gu", **value}
        raise ValueError("must be off, the name of a preset, or settings")

    def record(self) -> dict[str, Any]:
        """Return the settings that determine the result, for the provenance."""
        return self.model_dump(exclude_none=True, exclude={"output": True})
