"""The grammar of a merge recipe: what may be written, of which type, with which default.

Only the form is checked here; whether the method knows a parameter is checked in ``loader``, and
whether the sources fit together by the planner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from orthomerge.adapters.memory import AdapterState
from orthomerge.checkpoints.dtypes import dtype_from_name
from orthomerge.errors import OrthoMergeError
from orthomerge.merging.lora.ranks import parse_rank
from orthomerge.recipe.sizes import parse_size

__all__ = ["AdapterSettings", "MergeRecipe", "ModelEntry", "OutputSettings", "RunSettings"]


def _size(value: Any) -> int:
    try:
        return parse_size(value)
    except OrthoMergeError as error:
        raise ValueError(str(error)) from error


def _dtype(value: Any) -> Any:
    try:
        return dtype_from_name(value) and value
    except (OrthoMergeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _device(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"cpu|cuda(:\d+)?", value):
        return value
    raise ValueError("must be cpu, cuda or cuda:N")


def _rank(value: Any) -> Any:
    try:
        return parse_rank(value) and value
    except OrthoMergeError as error:
        raise ValueError(f"must be {error.expected}") from error


def _heads(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"average|error|keep:[1-9]\d*", value):
        return value
    raise ValueError("must be average, error or keep:N, N being the place of a model, from 1")


Device = Annotated[str, BeforeValidator(_device)]
Size = Annotated[int, BeforeValidator(_size)]
Dtype = Annotated[str, BeforeValidator(_dtype)]


def _source(value: Any) -> Any:
    """Accept a path, a hub name or (from Python) a state dict or an adapter in memory."""
    if isinstance(value, Path):
        return str(value)
    if (isinstance(value, str) and value) or isinstance(value, Mapping | AdapterState):
        return value
    raise ValueError("must be a path or hf:org/name")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class ModelEntry(_Strict):
    """One model to merge."""

    path: Annotated[Any, BeforeValidator(_source)] = Field(
        description="File, folder or hf:org/name[@revision]."
    )
    weight: Any = Field(default=None, description="Scalar, gradient over the layers, or rules.")


class OutputSettings(_Strict):
    """What is written."""

    path: str | None = Field(default=None, description="Folder, or a file ending in .safetensors.")
    dtype: Dtype | None = Field(
        default=None, description="dtype of floating tensors; default: the base's."
    )
    max_shard_size: Size = Field(default=5_000_000_000, description="Largest file, e.g. 5GB.")
    back_map: Literal["auto", "as_trained", "exact"] = Field(
        default="auto", description="How a merged OFT generator becomes a rotation."
    )
    form: Literal["auto", "full", "lora", "dora"] = Field(
        default="auto",
        description="What LoRA adapters become: an adapter (auto without base), a DoRA adapter, or "
        "a full checkpoint (auto with base).",
    )
    rank: Annotated[Any, BeforeValidator(_rank)] = Field(
        default=None,
        description="Rank of a merged LoRA adapter: a number, energy:0.99, parameters:1000000; "
        "default: lossless.",
    )
    style: Literal["auto", "peft", "kohya", "diffusers"] = Field(
        default="auto", description="Format of a merged LoRA adapter; default: the adapters' own."
    )
    component: str | None = Field(
        default=None,
        description="Part of a pipeline a PEFT adapter belongs to (unet), for kohya and diffusers.",
    )
    provenance: bool = Field(default=True, description="Record how the output was made.")


class AdapterSettings(_Strict):
    """How adapters of different contents fit together."""

    absent: Literal["zero", "skip", "error"] = Field(
        default="zero",
        description="Modules that a LoRA adapter does not change: no change, left out, or refused.",
    )
    heads: Annotated[str, BeforeValidator(_heads)] = Field(
        default="average",
        description="Trained heads that several adapters carry: average, error, or keep:N.",
    )
    assume_same_base: bool = Field(
        default=False, description="Merge adapters although they name different base models."
    )


class RunSettings(_Strict):
    """How the work is done; none of it changes the result beyond rounding."""

    device: Device = Field(default="cpu", description="cpu, cuda or cuda:N.")
    compute_dtype: Literal["float32", "float64"] | None = Field(
        default=None,
        description="dtype of the arithmetic; default: float32, float64 for float64 inputs.",
    )
    memory_budget: Size | None = Field(default=None, description="Working memory, e.g. 8GB.")
    workers: int | None = Field(default=None, ge=1, le=256, description="Threads.")


class MergeRecipe(_Strict):
    """A merge: which models, how, and where to."""

    models: Annotated[list[ModelEntry], Field(min_length=1, description="The models to merge.")]
    base: Annotated[Any, BeforeValidator(_source)] = Field(
        default=None, validate_default=False, description="The model they were fine-tuned from."
    )
    method: str | None = Field(
        default=None, description="Method id; default: what the models suggest."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Method parameters: scalar, gradient or rules."
    )
    missing: Literal["error", "copy-base", "skip"] = Field(
        default="error", description="What to do with tensors that not every model has."
    )
    adapters: AdapterSettings = Field(default_factory=AdapterSettings)
    norm_matched: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Size of the whole update / size of the sum of all changes; "
        "default: as the method makes it.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of methods that draw random numbers.")
    output: OutputSettings = Field(default_factory=OutputSettings)
    run: RunSettings = Field(default_factory=RunSettings)

    @field_validator("models", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """Let a model be written as its path alone."""
        if not isinstance(value, list | tuple):
            return value
        written_out = (ModelEntry, Mapping)
        return [item if isinstance(item, written_out) else {"path": item} for item in value]

    def record(self) -> dict[str, Any]:
        """Return the settings that determine the result, for the provenance."""
        content = self.model_dump(exclude_none=True, exclude={"run": True, "output": {"path"}})
        for entry in content["models"]:
            entry["path"] = _spelled(entry["path"])
        if "base" in content:
            content["base"] = _spelled(content["base"])
        return content


def _spelled(source: Any) -> str:
    if isinstance(source, AdapterState):
        return f"adapter '{source.name}' in memory"
    return source if isinstance(source, str) else "state dict"
