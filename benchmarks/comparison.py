"""Add up how far merged tensors are from their fp64 results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fp64_oracle import near_midpoint, round_to_bf16, ulp_distance
from torch import Tensor

__all__ = ["Comparison", "Truth"]


@dataclass(frozen=True)
class Truth:
    """What a merged tensor should be.

    Args:
        exact: The fp64 result.
        origin: What the change is measured from: the base, or the first model.
        inputs_step: bf16 step at the largest input of each element.
        undecided: Where the fp64 result itself hangs on a rounding error.
    """

    exact: Tensor
    origin: Tensor
    inputs_step: Tensor
    undecided: Tensor


@dataclass
class Comparison:
    """What one tool's output differs from the fp64 results by, added up over tensors."""

    tensors: int = 0
    elements: int = 0
    causes: dict[str, int] = field(
        default_factory=lambda: {"near_midpoint": 0, "undecided_election": 0, "other": 0}
    )
    largest_ulps: int = 0
    largest_input_ulps: float = 0.0
    largest_decided_input_ulps: float = 0.0
    squares: dict[str, float] = field(default_factory=dict)

    def add(self, found: Tensor, truth: Truth) -> None:
        """Take in one tensor."""
        exact = truth.exact
        expected = round_to_bf16(exact)
        ulps = ulp_distance(found, expected)
        wrong = ulps != 0
        undecided = wrong & truth.undecided
        midpoint = wrong & ~truth.undecided & near_midpoint(exact)
        self.tensors += 1
        self.elements += ulps.numel()
        counts = [int(mask.count_nonzero()) for mask in (wrong, midpoint, undecided)]
        self.causes["near_midpoint"] += counts[1]
        self.causes["undecided_election"] += counts[2]
        self.causes["other"] += counts[0] - counts[1] - counts[2]
        errors = (found.double() - exact).abs() / truth.inputs_step
        decided = errors.masked_fill(truth.undecided, 0.0)
        self.largest_ulps = max(self.largest_ulps, int(ulps.max()))
        self.largest_input_ulps = max(self.largest_input_ulps, errors.max().item())
        self.largest_decided_input_ulps = max(self.largest_decided_input_ulps, decided.max().item())
        for name, values in (("change", truth.origin), ("error", found), ("least", expected)):
            square = (values.double() - exact).square().sum().item()
            self.squares[name] = self.squares.get(name, 0.0) + square

    def facts(self) -> dict[str, Any]:
        """Return the comparison, JSON-ready."""
        change = self.squares["change"]
        wrong = sum(self.causes.values())
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "not_correctly_rounded": wrong,
            "not_correctly_rounded_by_cause": self.causes,
            "share_not_correctly_rounded": wrong / self.elements,
            "largest_ulp_distance": self.largest_ulps,
            "largest_error_in_input_ulps": self.largest_input_ulps,
            "largest_decided_error_in_input_ulps": self.largest_decided_input_ulps,
            "relative_error": (self.squares["error"] / change) ** 0.5,
            "relative_error_rounded_once": (self.squares["least"] / change) ** 0.5,
        }
