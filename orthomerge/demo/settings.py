"""Sizes, steps and learning rates of the demo, the same for all experts of a kind.

The learning rates were chosen on a part of the training images; the numbers of steps were then cut
to what two slow cores train in time. Neither was chosen by how a merge does.
"""

from __future__ import annotations

from dataclasses import dataclass

from orthomerge.demo.data import DOMAINS

__all__ = ["FULL_DEMO", "QUICK_DEMO", "DemoSettings", "TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train.

    Args:
        steps: Optimiser steps.
        learning_rate: Peak of AdamW's learning rate; a tenth of the steps warm up, then it falls
            linearly to zero.
        batch_size: Images in each step.
    """

    steps: int
    learning_rate: float
    batch_size: int = 64


@dataclass(frozen=True)
class DemoSettings:
    """What to train, and for how long.

    Args:
        domains: One expert of each kind is trained for each.
        base: Training of the base on clean digits.
        full: Training of each full fine-tune.
        oft: Training of each OFT adapter.
        layers: Transformer layers.
        hidden: Width of the model.
        oft_block_size: Side of the rotations' blocks; divides ``hidden``.
    """

    domains: tuple[str, ...]
    base: TrainSettings
    full: TrainSettings
    oft: TrainSettings
    layers: int = 2
    hidden: int = 64
    oft_block_size: int = 16


FULL_DEMO = DemoSettings(
    domains=tuple(DOMAINS),
    base=TrainSettings(steps=300, learning_rate=2e-3),
    full=TrainSettings(steps=100, learning_rate=1e-3),
    oft=TrainSettings(steps=100, learning_rate=1e-2),
)

QUICK_DEMO = DemoSettings(
    domains=("blurred", "dead-lines"),
    base=TrainSettings(steps=150, learning_rate=2e-3),
    full=TrainSettings(steps=30, learning_rate=1e-3),
    oft=TrainSettings(steps=30, learning_rate=1e-2),
)
