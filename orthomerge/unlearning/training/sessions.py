"""The model of a run with what is made around it: reference, projector, callback, trainer."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from orthomerge.unlearning.data import PairedRows, TokenisedSet, collate
from orthomerge.unlearning.objectives import reference_for
from orthomerge.unlearning.training.callbacks import StepReport, UnlearnCallback
from orthomerge.unlearning.training.keeping import Snapshot
from orthomerge.unlearning.training.loading import (
    device_of,
    load_model,
    precision_of,
    with_adapter,
)
from orthomerge.unlearning.training.measuring import SetScores, rows_measured, score_rows
from orthomerge.unlearning.training.preparing import PreparedSets
from orthomerge.unlearning.training.projecting import make_projector
from orthomerge.unlearning.training.settings import UnlearnRequest
from orthomerge.unlearning.training.stopping import Level, Reading, StopRule
from orthomerge.unlearning.training.trainer import UnlearnTrainer

__all__ = ["Session"]

# The learning rate where none is given: what the methods' authors use for whole models of billions
# of weights, and what is usual for adapters on them.
_RATES = {"full": 1e-5, "lora": 2e-4, "oft": 2e-4}
_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}


class Session:
    """A loaded model with its adapter, and everything that runs it.

    Args:
        request: The run.
        sets: Its sets.
    """

    def __init__(self, request: UnlearnRequest, sets: PreparedSets) -> None:
        from transformers import set_seed

        self.request, self.sets = request, sets
        self.notes: list[str] = []
        set_seed(request.train.seed)
        model = load_model(request.model, request.adapter, request.train)
        self.model = with_adapter(model, request.adapter).to(self._device())
        self.start = Snapshot(self.model)  # before a point to resume from is loaded
        self._caches = model.config.use_cache
        self._gold: SetScores | None = self._gold_scores()
        known = {"forget": sets.forget, "alternate": sets.alternate}
        self.reference = reference_for(
            self.model,
            request.objective.needs,
            sets={name: found for name, found in known.items() if found is not None},
            batch_size=request.train.batch_size,
        )
        self.projector = make_projector(request, sets, self.model, self.reference, self.autocast)

    def measure_all(self) -> dict[str, SetScores]:
        """Return the scores of the forget, retain and holdout rows that are measured."""
        named = {
            "forget": self.sets.forget,
            "retain": self.sets.check,
            "holdout": self.sets.holdout,
        }
        return {name: self._scores(found) for name, found in named.items() if found is not None}

    def level(self, before: Mapping[str, SetScores]) -> Level | None:
        """Return where to stop, from the gold model, the holdout, or the settings."""
        stop = self.request.stop
        if stop.level == "none":
            return None
        if isinstance(stop.level, float | int):
            return Level(float(stop.level), 0.0, "given")
        if self._gold is not None:
            return Level(self._gold.loss, self._gold.deviation, "gold")
        if "holdout" in before:
            return Level(before["holdout"].loss, before["holdout"].deviation, "holdout")
        self.notes.append(
            "there is no holdout and no gold model, so nothing says when it is enough: all steps "
            "are taken"
        )
        return None

    def callback(
        self,
        before: Mapping[str, SetScores],
        level: Level | None,
        report: Callable[[StepReport], None],
    ) -> UnlearnCallback:
        """Return what measures and decides after every step."""
        stop = self.request.stop
        retain = before["retain"].loss if "retain" in before else None
        rule = StopRule(
            level, stop.tolerance, stop.max_retain_rise, Reading(0, before["forget"].loss, retain)
        )
        every = self.request.measured_every
        return UnlearnCallback(self._reading, rule, self.start, every=every, report=report)

    def pairs(self) -> PairedRows:
        """Return what is trained on: every forget row with the retain rows of its step."""
        return PairedRows(
            self.sets.forget,
            self.sets.retain,
            seed=self.request.train.seed,
            alternate=self.sets.alternate,
            retain_per_forget=self.request.data.retain_per_forget,
        )

    def trainer(self, work: Path, callback: UnlearnCallback) -> UnlearnTrainer:
        """Return the trainer, with its points to resume from in ``work``."""
        from transformers import PrinterCallback

        trainer = UnlearnTrainer(
            self.model,
            self._arguments(work),
            objective=self.request.objective,
            reference=self.reference,
            projector=self.projector,
            start_loss=self._start_loss(),
            train_dataset=self.pairs(),
            data_collator=collate(self.sets.pad_token_id),
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        callback.trainer = trainer
        return trainer

    def require_projected(self, trainer: UnlearnTrainer) -> None:
        """Make sure that every optimizer step was projected."""
        if self.projector is None:
            return
        steps, projected = trainer.state.global_step, self.projector.projections
        if projected != steps:
            raise RuntimeError(f"{projected} projections for {steps} optimizer steps")

    def finished_model(self) -> Any:
        """Return the model as it is to be written: the Trainer leaves use_cache switched off."""
        self.model.config.use_cache = self._caches
        return self.model

    def autocast(self) -> Any:
        """Return the context that forward passes run in."""
        precision = precision_of(self.request.train)
        if precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        return torch.autocast(device_of(self.request.train), dtype=dtype)

    def _reading(self, step: int) -> Reading:
        retain = None if self.sets.check is None else self._scores(self.sets.check).loss
        return Reading(step, self._scores(self.sets.forget).loss, retain)

    def _scores(self, data: TokenisedSet, model: Any = None, *, whole: bool = False) -> SetScores:
        return score_rows(
            self.model if model is None else model,
            data,
            pad_token_id=self.sets.pad_token_id,
            batch_size=self.request.train.batch_size,
            rows=None if whole else rows_measured(data, self.request.stop),
            autocast=self.autocast,
        )

    def _start_loss(self) -> Callable[[Any], float] | None:
        """Return what gives a retain batch's loss before the first step, if that is asked for."""
        projector, retain = self.projector, self.sets.retain
        if projector is None or retain is None or not projector.settings.restore:
            return None
        if self.request.objective.retain != "nll":
            return None  # it is zero at the start, or not in nats: the rule asks for no more
        known = self._scores(retain, whole=True)
        return lambda batch: known.of_batch(batch["row"])

    def _gold_scores(self) -> SetScores | None:
        stop = self.request.stop
        if stop.gold is None or stop.level != "auto":
            return None
        gold = load_model(stop.gold, self.request.adapter, self.request.train)
        scores = self._scores(self.sets.forget, gold.to(self._device()))
        del gold
        gc.collect()
        return scores

    def _device(self) -> str:
        wanted = self.request.train.device
        return device_of(self.request.train) if wanted == "auto" else wanted

    def _arguments(self, work: Path) -> Any:
        from transformers import TrainingArguments

        train, precision = self.request.train, precision_of(self.request.train)
        cpu = device_of(train) == "cpu"
        arguments = TrainingArguments(
            output_dir=str(work),
            max_steps=train.max_steps,
            per_device_train_batch_size=train.batch_size,
            gradient_accumulation_steps=train.accumulation,
            learning_rate=train.learning_rate or _RATES[self.request.adapter.kind],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=train.warmup_steps,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim=_OPTIMIZERS[train.optimizer],
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            **_checkpointing(train.gradient_checkpointing),
            seed=train.seed,
            data_seed=train.seed,
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            save_strategy="steps",
            save_steps=train.save_every,
            save_total_limit=2,
            logging_strategy="no",
            disable_tqdm=True,
        )
        if not cpu:
            arguments._n_gpu = 1  # else every GPU of the machine gets a batch of its own
        return arguments


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Return what asks for gradient checkpointing, whose name transformers 5.24 has changed."""
    if not wanted:
        return {}
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
