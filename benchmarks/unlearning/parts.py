"""What is run: the parts of the benchmark, each a table of methods, arms and strengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unlearning.arms import METHODS
from unlearning.descent import Scale, Setting

__all__ = ["PARTS", "Part"]

#: Retain weights that are tried; the loss of npo sums over tokens, so its range is wider.
GRID = {"grad-diff": (1.0, 3.0, 10.0), "npo": (1.0, 10.0, 30.0, 100.0)}

_GUARDED = ("none", "history", "bank")
_CONTROLS = ("none", "bank-shuffled", "bank-swapped", "bound")
_SMALL = Scale(batch=20, bank_rows=256, unused=60, steps=80)
_LARGE = Scale(batch=32, bank_rows=256, unused=200, steps=80)


@dataclass(frozen=True)
class Part:
    """One table.

    Args:
        meaning: For the report.
        size: Of the worlds.
        methods: By name: the retain weights that are tried.
        arms: Names of ``ARMS``; the first one is what the others are compared with.
        scale: Rows and steps.
        learning_rate: Of AdamW.
        lora_rank: 0: all weights are trained.
        tuned: Whether each arm gets the best of its retain weights.
    """

    meaning: str
    size: str
    methods: dict[str, Sequence[float]]
    arms: Sequence[str]
    scale: Scale
    learning_rate: float = 1e-4
    lora_rank: int = 0
    tuned: bool = False

    def settings(self, seed: int) -> Iterator[Setting]:
        """Yield the runs of one seed."""
        for method, weights in self.methods.items():
            for weight in weights:
                for arm in self.arms:
                    yield Setting(method, arm, weight, self.learning_rate, self.lora_rank, seed)


_USUAL = {name: (method.retain_weight,) for name, method in METHODS.items()}

PARTS = {
    "main": Part("usual retain weights", "S", _USUAL, _GUARDED, _SMALL),
    "controls": Part("false rows, and the measured rows", "S", _USUAL, _CONTROLS, _SMALL),
    "tuned": Part("best retain weight of each arm", "S", GRID, _GUARDED, _SMALL, tuned=True),
    "lora": Part(
        "LoRA of rank 16 on all linear layers",
        "S",
        {"ga": (0.0,), "npo": (10.0,)},
        _GUARDED,
        _SMALL,
        learning_rate=1e-3,
        lora_rank=16,
    ),
    "smoke": Part(
        "that it runs", "S", {"grad-diff": (1.0,)}, ("none", "bank", "bank-shuffled"), _SMALL
    ),
    "large": Part("1,000 questions", "M", _USUAL, _GUARDED, _LARGE),
}
