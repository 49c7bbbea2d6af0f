"""What a planner for one kind of source hands back: tasks, files, and the problems it met.

Also the arithmetic both planners share: dtypes of output and computation, size of the pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.checkpoints.dtypes import FLOAT_DTYPES, dtype_from_name
from orthomerge.errors import OrthoMergeError, RecipeError
from orthomerge.merging.nesting import nested_choices
from orthomerge.merging.plan import MergeRequest, Task
from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.rules import LayerMap, unmatched_rules, value_for

if TYPE_CHECKING:
    from orthomerge.adapters.convention import OftConvention
    from orthomerge.adapters.updates import AdapterUpdates
    from orthomerge.merging.lora.output import LoraOutput

__all__ = [
    "Draft",
    "Settings",
    "compute_dtype",
    "is_float",
    "piece_elements",
    "resolve_settings",
    "rule_problems",
    "weight_sum_problem",
]

_CPU_PIECE = 1 << 18  # 1 MiB in fp32: near the cache, and few enough to leave Python behind
_GPU_PIECE = 1 << 24


@dataclass
class Draft:
    """A plan in the making.

    ``surveyed_entries`` says how many entries of a task a survey sees, where not its output's.
    """

    tasks: list[Task] = field(default_factory=list)
    problems: list[OrthoMergeError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    copied_files: dict[str, Path] = field(default_factory=dict)
    written_files: dict[str, str] = field(default_factory=dict)
    compute_dtype: str = "F32"
    piece_elements: int = _CPU_PIECE
    survey_bytes: int = 0
    surveyed_entries: dict[str, int] = field(default_factory=dict)
    filename: str = "model.safetensors"
    convention: OftConvention | None = None
    changes: tuple[AdapterUpdates | None, ...] | None = None
    lora: LoraOutput | None = None

    def report_once(self, problem: OrthoMergeError) -> None:
        """Add a problem of settings, which every tensor has alike, for the first of them only."""
        if problem.problem not in {known.problem for known in self.problems}:
            self.problems.append(problem)


@dataclass(frozen=True, slots=True)
class Settings:
    """The method's settings for one tensor."""

    weights: tuple[float, ...]
    parameters: dict[str, Any]


def piece_elements(request: MergeRequest) -> int:
    """Return how many elements are worked on at a time."""
    return _CPU_PIECE if request.device == "cpu" else _GPU_PIECE


def compute_dtype(request: MergeRequest, stored: Iterable[str]) -> str:
    """Return the dtype of the arithmetic: as asked, else fp64 for fp64 inputs, else fp32.

    Raises:
        RecipeError: Something other than float32 or float64 was asked for.
    """
    if request.compute_dtype is None:
        return "F64" if "F64" in set(stored) else "F32"
    name = dtype_from_name(request.compute_dtype)
    if name not in ("F32", "F64"):
        raise RecipeError(
            "the compute dtype must be float32 or float64",
            found=request.compute_dtype,
            remedy="16-bit arithmetic would round more than once; the output dtype is separate.",
        )
    return name


def is_float(dtype: str) -> bool:
    """Return whether tensors of this dtype can be averaged."""
    return dtype in FLOAT_DTYPES


def resolve_settings(
    request: MergeRequest, method: MergeMethod, name: str, layers: LayerMap
) -> Settings:
    """Return weights and parameters for one tensor, rules and gradients applied."""
    given = request.weights or (1.0,) * len(request.models)
    weights = tuple(float(value_for(value, name, layers, 1.0)) for value in given)
    parameters = {
        key: parameter.check(
            value_for(
                request.parameters.get(key, parameter.default), name, layers, parameter.default
            )
        )
        for key, parameter in method.parameters.items()
    }
    return Settings(weights, parameters)


def weight_sum_problem(
    method: MergeMethod, settings: Settings, present: Sequence[bool], name: str
) -> OrthoMergeError | None:
    """Return the problem of weights that sum to zero where the method divides by their sum."""
    taking_part = [w for w, here in zip(settings.weights, present, strict=True) if here]
    total = sum(taking_part)
    if abs(total) > 1e-9 * max(map(abs, taking_part), default=0.0):
        return None
    given = settings.parameters
    for each, own in [(method, given), *nested_choices(method, given, deep=True)]:
        if each.uses_weights and each.needs_weight_sum(own):
            return RecipeError(
                f"the weights sum to zero and {each.name} divides by their sum",
                tensor=name,
                found=", ".join(f"{weight:g}" for weight in taking_part),
                remedy="Change the weights, or switch the normalisation off where there is one.",
            )
    return None


def rule_problems(
    request: MergeRequest, method: MergeMethod, names: Iterable[str]
) -> list[OrthoMergeError]:
    """Return a problem for each glob that matches no tensor."""
    known = list(names)
    values: Mapping[str, Any] = {
        **{f"parameter '{key}'": value for key, value in request.parameters.items()},
        **{f"the weight of model {i + 1}": w for i, w in enumerate(request.weights or ())},
    }
    return [
        RecipeError(
            f"the rule '{glob}' of {where} matches no tensor",
            remedy="List the names with: orthomerge inspect MODEL --tensors",
        )
        for where, value in values.items()
        for glob in unmatched_rules(value, known)
    ]
