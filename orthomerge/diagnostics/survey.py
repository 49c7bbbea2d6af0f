"""Which layers of which models a diagnosis will measure, decided and checked from headers.

The measuring itself is in ``geometry``; no tensor is read here.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from orthomerge.adapters.sources import Source, open_source
from orthomerge.adapters.updates import WeightUpdate, adapter_updates
from orthomerge.checkpoints.dtypes import FLOAT_DTYPES
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.roles import tensor_role
from orthomerge.checkpoints.sources import CheckpointSource
from orthomerge.errors import OrthoMergeError, RecipeError, TensorMismatchError, combined

if TYPE_CHECKING:
    import torch

__all__ = ["Part", "Survey", "SurveyedLayer", "plan_survey"]


class Part(Protocol):
    """One model's part in one weight."""

    @property
    def read_bytes(self) -> int:
        """How much is read."""

    def delta(self, W0: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return W - W0 in ``dtype``, on W0's device."""


@dataclass(frozen=True)
class WholeTensor:
    """A weight that a model holds itself."""

    source: Source
    name: str

    @property
    def read_bytes(self) -> int:
        """Its size."""
        return self.source.checkpoint.tensors[self.name].nbytes

    def delta(self, W0: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the difference from the base."""
        return self.source.checkpoint.read(self.name).to(W0.device, dtype) - W0


@dataclass(frozen=True)
class SurveyedLayer:
    """One tensor of the base, or one module of adapters, to be measured.

    Attributes:
        name: Its name.
        role: What it is; "module" without a base.
        parts: One per model; None where the model leaves it as it is.
        read_bytes: How much is read.
    """

    name: str
    role: str
    parts: tuple[Part | WeightUpdate | None, ...]
    read_bytes: int


@dataclass
class Survey:
    """What will be measured.

    Attributes:
        sources: The models.
        base: The base, if there is one.
        layers: In the base's order.
        skipped: Why tensors were left out -> how many.
    """

    sources: tuple[Source, ...]
    base: Source | None
    layers: tuple[SurveyedLayer, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def read_bytes(self) -> int:
        """Size of everything that is read."""
        return sum(layer.read_bytes for layer in self.layers)


def plan_survey(
    models: Sequence[CheckpointSource],
    base: CheckpointSource | None = None,
    *,
    layers: str | None = None,
    include_embeddings: bool = False,
    block: int | None = None,
) -> Survey:
    """Open models and base and choose the layers to measure; headers only.

    Args:
        models: Full checkpoints or adapters.
        base: What they were fine-tuned from; not needed for adapters that rotate.
        layers: Glob over tensor names (module names without a base).
        include_embeddings: Measure embeddings and output heads too.
        block: Size of the diagonal blocks that rotations are restricted to.

    Raises:
        CheckpointError: A model cannot be opened, lacks a layer, or has it in another shape.
        AdapterError: An adapter is malformed or does not fit the base.
        RecipeError: A base is needed, no layer matches, or the block size does not divide one.
    """
    if not models:
        raise RecipeError("there is no model to look at", expected="at least one")
    sources = tuple(open_source(model) for model in models)
    opened = None if base is None else open_source(base)
    survey = Survey(sources, opened)
    if opened is None:
        _survey_modules(survey, layers)
    else:
        _survey_base(survey, opened, layers, include_embeddings, block)
    if not survey.layers:
        raise RecipeError(
            "there is no layer to look at",
            expected=f"names like '{layers}'" if layers else "a matrix that is no embedding",
            found=", ".join(f"{count} {why}" for why, count in survey.skipped.items()) or None,
            remedy="`orthomerge inspect --tensors` lists the names; --embeddings adds embeddings.",
        )
    return survey


def _survey_base(
    survey: Survey, base: Source, glob: str | None, include_embeddings: bool, block: int | None
) -> None:
    if base.kind != "full":
        raise RecipeError("the base is an adapter", file=base.origin, expected="a full checkpoint")
    tensors = base.checkpoint.tensors
    find = [_finder(source, base) for source in survey.sources]
    roles = {"linear", "stack"} | ({"embedding"} if include_embeddings else set())
    problems: list[OrthoMergeError] = []
    found = []
    for name, info in tensors.items():
        role = tensor_role(name, info.shape)
        why = _left_out(name, info, role, roles, glob)
        if why is not None:
            survey.skipped[why] += 1
            continue
        try:
            parts = tuple(part(info) for part in find)
        except OrthoMergeError as error:
            problems.append(error)
            continue
        if not any(parts):
            survey.skipped["that no adapter changes"] += 1
            continue
        problems += _unfit(info, role, block)
        size = info.nbytes + sum(part.read_bytes for part in parts if part is not None)
        found.append(SurveyedLayer(name, role, parts, size))
    if problems:
        raise combined(problems)
    survey.layers = tuple(found)


def _left_out(
    name: str, info: TensorInfo, role: str, roles: set[str], glob: str | None
) -> str | None:
    if role not in roles:
        return {"other": "vectors and norms", "convolution": "convolutions"}.get(role, f"{role}s")
    if info.dtype not in FLOAT_DTYPES:
        return f"of dtype {info.dtype}"
    if glob is not None and not fnmatch.fnmatchcase(name, glob):
        return f"not like '{glob}'"
    return None


def _finder(source: Source, base: Source) -> Callable[[TensorInfo], Part | WeightUpdate | None]:
    """Return what finds a model's part in a tensor of the base."""
    if source.kind == "full":
        return lambda info: _whole(source, info.name, info)
    changed = adapter_updates(source, base.checkpoint.tensors)

    def find(info: TensorInfo) -> Part | WeightUpdate | None:
        if info.name in changed.updates:
            return changed.updates[info.name]
        own = changed.replacements.get(info.name)
        return None if own is None else _whole(source, own, info)

    return find


def _whole(source: Source, name: str, info: TensorInfo) -> WholeTensor:
    own = source.checkpoint.tensors.get(name)
    if own is None:
        raise TensorMismatchError(
            "is in the base, not in this model",
            file=source.origin,
            tensor=name,
            remedy="Give the base it was fine-tuned from, or leave the layer out with --layers.",
        )
    if own.shape != info.shape:
        raise TensorMismatchError(
            "the shapes differ",
            file=source.origin,
            tensor=name,
            expected=list(info.shape),
            found=list(own.shape),
            remedy="Only models of one architecture and size can be compared.",
        )
    if own.dtype not in FLOAT_DTYPES:
        raise TensorMismatchError(
            "is not floating-point",
            file=source.origin,
            tensor=name,
            found=own.dtype,
            remedy="Dequantise the model first.",
        )
    return WholeTensor(source, name)


def _unfit(info: TensorInfo, role: str, block: int | None) -> list[OrthoMergeError]:
    columns = info.shape[-1] if role == "stack" else math.prod(info.shape[1:])
    if block is None or (block > 0 and columns % block == 0):
        return []
    return [
        RecipeError(
            "the block size does not divide the inputs of this layer",
            tensor=info.name,
            expected=f"a divisor of {columns}",
            found=block,
        )
    ]


def _survey_modules(survey: Survey, glob: str | None) -> None:
    """Choose the modules of adapters that rotate, which need no base to be measured."""
    problems: list[OrthoMergeError] = [
        RecipeError(
            f"a {source.description} cannot be measured without its base",
            file=source.origin,
            remedy="Pass --base: the model it was fine-tuned from.",
        )
        for source in survey.sources
        if source.rotations is None
    ]
    if problems:
        raise combined(problems)
    adapters = [source.rotations for source in survey.sources if source.rotations is not None]
    found = []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        if glob is not None and not fnmatch.fnmatchcase(name, glob):
            survey.skipped[f"not like '{glob}'"] += 1
            continue
        size = sum(
            adapter.source.tensors[key].nbytes
            for adapter in adapters
            if name in adapter.modules
            for key in adapter.modules[name].keys
        )
        found.append(SurveyedLayer(name, "module", (None,) * len(adapters), size))
    survey.layers = tuple(found)
