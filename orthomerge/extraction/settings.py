"""What an extraction is asked for, and whether that makes sense by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from orthomerge.errors import OrthoMergeError, RecipeError, UnknownNameError

__all__ = ["ExtractKind", "ExtractSettings"]

ExtractKind = Literal["oft+lora", "oft", "lora"]


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """Settings of an extraction.

    Attributes:
        kind: Which adapters to make.
        rank: Most rank of a LoRA module; None only with ``energy``.
        energy: Take the smallest rank that keeps this share of ``||.||_F^2`` of what LoRA is to
            explain; None takes ``rank``.
        block_size: OFT block size asked for; a layer gets the nearest divisor of its columns.
        targets: Patterns of module or tensor names; none takes every linear weight.
        anchor: Relative weight of staying near the identity in the rotation fit.
    """

    kind: ExtractKind = "oft+lora"
    rank: int | None = 16
    energy: float | None = None
    block_size: int = 32
    targets: tuple[str, ...] = ()
    anchor: float = 1e-3

    @property
    def rotates(self) -> bool:
        """Whether an OFT adapter is made."""
        return self.kind != "lora"

    @property
    def low_rank(self) -> bool:
        """Whether a LoRA adapter is made."""
        return self.kind != "oft"

    def problems(self) -> list[OrthoMergeError]:
        """Return everything that is wrong with the values."""
        found: list[OrthoMergeError] = []
        if self.kind not in get_args(ExtractKind):
            found.append(UnknownNameError("kind of adapter", self.kind, get_args(ExtractKind)))
        if self.rank is None and self.energy is None:
            found.append(RecipeError("give a rank, an energy, or both"))
        if self.rank is not None and self.rank < 1:
            found.append(RecipeError("the rank must be at least 1", found=self.rank))
        if self.energy is not None and not 0 < self.energy <= 1:
            found.append(RecipeError("the energy is a share in (0, 1]", found=self.energy))
        if self.block_size < 2:
            found.append(RecipeError("OFT blocks have at least 2 columns", found=self.block_size))
        if not (math.isfinite(self.anchor) and self.anchor >= 0):
            found.append(RecipeError("the anchor must be finite and >= 0", found=self.anchor))
        return found
