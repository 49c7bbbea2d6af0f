"""One unlearning run in a plain loop: the library's objective and projector, step by step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearning.arms import ARMS, METHODS, Arm, Feed, shuffled, swapped
from unlearning.crossing import Goal
from unlearning.encoding import Encoded, TokenBatch, collate
from unlearning.models import World, row_scores

__all__ = ["Scale", "Setting", "Split", "descend", "split_retain"]


@dataclass(frozen=True)
class Scale:
    """How much is looked at.

    Args:
        batch: Forget rows and retain rows per step.
        bank_rows: Rows in all groups of the bank together.
        unused: At most so many retain rows are kept out of every gradient, to measure drift on.
        steps: Where a run that does not reach the level is given up.
    """

    batch: int
    bank_rows: int
    unused: int
    steps: int


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        method: A name of ``METHODS``.
        arm: A name of ``ARMS``.
        retain_weight: α.
        learning_rate: Of AdamW, constant.
        lora_rank: 0: all weights are trained.
        seed: Of the order of the rows.
    """

    method: str
    arm: str
    retain_weight: float
    learning_rate: float
    lora_rank: int
    seed: int


@dataclass(frozen=True)
class Split:
    """The retain rows: those that may be used for gradients, and those that never are."""

    used: list[Encoded]
    unused: list[Encoded]


def split_retain(rows: Sequence[Encoded], seed: int, most_unused: int) -> Split:
    """Draw a third of the rows, or ``most_unused``, to measure drift on."""
    order = list(range(len(rows)))
    random.Random(f"retain rows {seed}").shuffle(order)
    unused = min(len(rows) // 3, most_unused)
    return Split([rows[i] for i in order[unused:]], [rows[i] for i in order[:unused]])


def descend(world: World, setting: Setting, scale: Scale, goal: Goal) -> dict[str, list[float]]:
    """Unlearn until the mean forget loss is that of the goal, and no more rows are reproduced.

    Returns:
        Curves: ``forget``, ``exact`` (share of forget rows still reproduced), ``drift`` and
        ``known`` (mean losses on rows without gradients) before the first step and after each,
        and ``cpu_seconds`` of each step, measuring left out. With a projector also, of each
        step, the cosine of the retain gradient with the realised update (``cosine``), and the
        largest forbidden one of any protected row and tensor (``residual``).
    """
    split = split_retain(world.rows["retain"], setting.seed, scale.unused)
    stepper = _Stepper(world, setting, scale, split)
    curves: dict[str, list[float]] = {
        name: [] for name in ("forget", "exact", "drift", "known", "cpu_seconds")
    }
    forget_places = _stream(len(world.rows["forget"]), scale.batch, f"forget {setting.seed}")
    retain_places = _stream(len(split.used), scale.batch, f"retain {setting.seed}")
    _measure(stepper.model, world, split, curves)
    while None in goal.places(curves["forget"], curves["exact"]):
        if len(curves["cpu_seconds"]) == scale.steps:
            break
        started = time.process_time()
        stepper.step(next(forget_places), next(retain_places))
        curves["cpu_seconds"].append(time.process_time() - started)
        if stepper.projector is not None:
            last = stepper.projector.last
            curves.setdefault("cosine", []).append(last.cos_after or 0.0)
            curves.setdefault("residual", []).append(last.residual_after or 0.0)
        _measure(stepper.model, world, split, curves)
    return curves


def _measure(model: Any, world: World, split: Split, curves: dict[str, list[float]]) -> None:
    forget = row_scores(model, world.rows["forget"])
    curves["forget"].append(forget.loss)
    curves["exact"].append(float(forget.exact.double().mean()))
    curves["drift"].append(row_scores(model, split.unused).loss)
    curves["known"].append(row_scores(model, world.rows["known"][::4]).loss)


def _stream(count: int, batch: int, seed: str) -> Iterator[list[int]]:
    """Yield batches of places from one shuffled round after the other."""
    draw, left = random.Random(seed), []
    while True:
        while len(left) < batch:
            left += draw.sample(range(count), count)
        yield left[:batch]
        left = left[batch:]


class _Stepper:
    """The model of one run and what changes it."""

    def __init__(self, world: World, setting: Setting, scale: Scale, split: Split) -> None:
        from orthomerge.unlearning.objectives import get_objective, reference_for

        method, arm = METHODS[setting.method], ARMS[setting.arm]
        self.forget, self.used, self.alpha = world.rows["forget"], split.used, setting.retain_weight
        self.model = world.model("target")
        if setting.lora_rank:
            self.model = _with_lora(self.model, setting.lora_rank, setting.seed)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=setting.learning_rate, weight_decay=0.0
        )
        self.objective = get_objective(method.objective).bind(**method.parameters)
        self.retain = get_objective("grad-diff").bind()
        self.reference = reference_for(
            self.model, self.objective.needs, sets={"forget": [vars(row) for row in self.forget]}
        )
        self.feed: Feed | None = None
        self.projector: Any = None
        self.honest = arm.shown == "retain"
        if arm.preset is not None:
            self.feed = self._feed(arm, split, setting.seed)
            self.projector = self._projector(arm, scale)

    def _retain_loss(self, batch: TokenBatch) -> Tensor:
        loss = self.retain.retain_loss(self.model, None, {"retain": batch})
        assert loss is not None
        return loss

    def _feed(self, arm: Arm, split: Split, seed: int) -> Feed:
        rows, loss = split.used, self._retain_loss
        if arm.shown == "shuffled":
            loss = shuffled(loss, self.parameters, seed)
        elif arm.shown == "swapped":
            rows = swapped(rows, seed)
        elif arm.shown == "drift":
            rows = split.unused
        return Feed(rows, loss, _token_sums(self.model, rows), whole=arm.shown == "drift")

    def _projector(self, arm: Arm, scale: Scale) -> Any:
        from orthomerge.unlearning.projection import RetainProjector, preset

        settings = preset(str(arm.preset), **arm.changes)
        projector = RetainProjector(self.parameters, **settings)
        if arm.bank:
            assert self.feed is not None
            groups = self.feed.groups(projector.settings.bank_size, scale.bank_rows)
            projector.set_bank(groups)
        return projector

    def step(self, forget: Sequence[int], retain: Sequence[int]) -> None:
        """Do one step of the optimizer."""
        batch = {"forget": collate(self.forget, forget)}
        self.optimizer.zero_grad()
        loss = self.objective.forget_loss(self.model, self.reference, batch)
        weighted = self.objective.forget_weight * loss
        if self.projector is None:
            if self.alpha:
                weighted = weighted + self.alpha * self._retain_loss(collate(self.used, retain))
            weighted.backward()
            self.optimizer.step()
            return
        loss.backward()
        self._project(retain)
        with self.projector.guard(self.optimizer):
            self.optimizer.step()
        self.projector.end_window()

    def _project(self, retain: Sequence[int]) -> None:
        """Project what is in ``.grad``; where the rows are false, the retain term is not."""
        assert self.feed is not None
        value, start = self.feed.window(retain)
        self.projector.update(value, start_loss=start)
        gamma = self.objective.forget_weight
        if self.honest:
            self.projector.project_(retain_weight=self.alpha, forget_scale=gamma)
            return
        self.projector.project_(retain_weight=0.0, forget_scale=gamma)
        if self.alpha:
            true = self._retain_loss(collate(self.used, retain))
            gradients = torch.autograd.grad(true, self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad.add_(gradient, alpha=self.alpha)


def _token_sums(model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    scores = row_scores(model, rows)
    counts = torch.tensor([sum(label != -100 for label in row.labels) for row in rows])
    return scores.losses * counts, counts


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
    return get_peft_model(model, config).eval()
