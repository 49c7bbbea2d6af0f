"""The trainer: forget and retain gradients apart, the projection between them and the optimizer.

Everything else (batches, clipping, schedule, precision, devices, checkpoints) is the Trainer's of
transformers. What happens after a step is in ``callbacks``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from orthomerge.errors import NumericalError, RecipeError
from orthomerge.unlearning.objectives import Objective
from orthomerge.unlearning.projection import RetainProjector
from orthomerge.unlearning.training.callbacks import UnlearnCallback
from orthomerge.unlearning.training.checkpointing import load_point, save_point
from orthomerge.unlearning.training.distributing import Processes
from orthomerge.unlearning.training.windows import window_shares

__all__ = ["UnlearnTrainer"]


class UnlearnTrainer(Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` for ``γ L_forget + α L_retain``, with or without projection.

    Each pass over a batch makes two gradients, one after the other. With a projector the forget
    gradient is projected once per optimizer step, after accumulation and before clipping, and the
    optimizer's step itself is corrected; without one the loss is the weighted sum and the steps
    are those of a plain ``Trainer`` with that loss, bit for bit.

    Args:
        model: The model, PEFT or plain.
        args: ``transformers.TrainingArguments`` with ``remove_unused_columns=False``.
        objective: The bound objective.
        train_dataset: ``PairedRows``; batches hold "forget", "retain" and "alternate".
        data_collator: As made by ``data.collate``.
        reference: The reference model, where the objective needs one.
        projector: The projection; it is attached to the optimizer here.
        start_loss: Gives the retain loss that a batch had before the first step, for the
            projector's rule of restoring what was lost.
        options: Further arguments of ``Trainer``.

    Raises:
        RecipeError: DeepSpeed is used, or values are clipped one by one.
        NumericalError: A loss is not finite.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        objective: Objective,
        reference: Any = None,
        projector: RetainProjector | None = None,
        start_loss: Callable[[Any], float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model=model, args=args, **options)
        self.objective = objective
        self.reference = reference
        self.projector = projector
        self.parts: dict[str, float] = {}
        self._start_loss = start_loss
        self._shares: list[dict[str, float]] = []
        self.model_accepts_loss_kwargs = False
        several = self.accelerator.num_processes > 1
        self.processes = Processes(self.accelerator) if several else None
        self._require_supported()

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer and let the projector correct its steps."""
        first = self.projector is not None and not self.projector.attached
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self.projector is not None and first:
            self.projector.scaler = self.accelerator.scaler
            self.projector.attach(optimizer)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *rest: Any) -> Any:
        """Fetch the batches of one optimizer step, and what share of it each is.

        The pairs of forget and retain rows change with the epoch. With several processes accelerate
        tells it to the sampler only, so that is done here; nothing is fetched earlier in an epoch.
        """
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(int(self.state.epoch or 0))
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, *rest)
        self._shares = window_shares(self.objective, batches, self.processes)
        self.parts = {}
        return batches, items

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Return ``γ L_forget + α L_retain``, for steps without projection."""
        share = self._share()
        loss = self.objective.forget_weight * self._forget_loss(model, inputs, share)
        retain = self._retain_loss(model, inputs, share)
        if retain is not None and self.objective.retain_weight:
            loss = loss + self.objective.retain_weight * retain
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take both gradients of one batch; project them when the optimizer is about to step."""
        if self.projector is None:
            return self._plain_step(model, inputs)
        model.train()
        inputs = self._prepare_inputs(inputs)
        share = self._share()
        with self._alone(model):
            with self.compute_loss_context_manager():
                forget = self._forget_loss(model, inputs, share)
            self.accelerator.backward(forget)
            with self.compute_loss_context_manager():
                retain = self._retain_loss(model, inputs, share)
            self._give_retain(retain, inputs, share["retain"])
        if self.accelerator.sync_gradients:
            self._agree()
            self.projector.project_(
                retain_weight=self.objective.retain_weight,
                forget_scale=self.objective.forget_weight,
            )
        total = self.objective.forget_weight * forget.detach()
        if retain is not None:
            total = total + self.objective.retain_weight * retain.detach()
        return total

    def _save_checkpoint(self, model: Any, trial: Any, **options: Any) -> None:
        """Save a point to resume from, completed by the projector's and the callbacks' state."""
        super()._save_checkpoint(model, trial, **options)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            save_point(folder, self._own_state())

    def resume_own_state(self, folder: Path) -> None:
        """Take over what a point holds beside the Trainer's own files."""
        state = load_point(folder)
        self.objective.load_state_dict(state["objective"])
        if self.projector is not None:
            self.projector.load_state_dict(state["projector"])
        for callback in self._own_callbacks():
            callback.restore(state["callback"])

    def _own_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"objective": self.objective.state_dict()}
        if self.projector is not None:
            state["projector"] = self.projector.state_dict()
        for callback in self._own_callbacks():
            state["callback"] = callback.state()
        return state

    def _own_callbacks(self) -> list[UnlearnCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, UnlearnCallback)]

    def _plain_step(self, model: Any, inputs: Any) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self._alone(model):
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
        if self.accelerator.sync_gradients and self.processes is not None:
            self._agree()
            self.processes.average_gradients(model.parameters())
        return loss.detach()

    def _agree(self) -> None:
        """Let all processes have the losses of the whole window."""
        if self.processes is not None:
            names = sorted(self.parts)
            means = self.processes.mean([self.parts[name] for name in names])
            self.parts = dict(zip(names, means, strict=True))

    def _give_retain(self, retain: Tensor | None, inputs: Any, share: float) -> None:
        assert self.projector is not None
        if retain is None:
            return
        # The loss is weighted by its share already, so what it is compared with must be, too.
        start = None if self._start_loss is None else share * self._start_loss(inputs["retain"])
        self.projector.update(retain, start_loss=start, backward=self.accelerator.backward)

    def _share(self) -> dict[str, float]:
        """Return this pass's share of the window's forget and retain losses."""
        return self._shares.pop(0) if self._shares else {"forget": 1.0, "retain": 1.0}

    def _forget_loss(self, model: Any, inputs: Any, share: dict[str, float]) -> Tensor:
        loss = self.objective.forget_loss(model, self.reference, inputs)
        return self._noted("forget", loss, share["forget"])

    def _retain_loss(self, model: Any, inputs: Any, share: dict[str, float]) -> Tensor | None:
        needed = self.projector is not None or self.objective.needs_retain
        if not needed or "retain" not in inputs:
            return None
        loss = self.objective.retain_loss(model, self.reference, inputs)
        return None if loss is None else self._noted("retain", loss, share["retain"])

    def _noted(self, name: str, loss: Tensor, share: float) -> Tensor:
        """Remember a loss, refuse one that is not finite, and weight it by its share."""
        bad = not bool(torch.isfinite(loss))
        if self.processes is not None:
            bad = self.processes.any(bad)
        if bad:
            raise NumericalError(
                f"the {name} loss is not finite at step {self.state.global_step + 1}",
                remedy="Lower train.learning_rate, or compute in bf16 or fp32.",
            )
        weighted = loss if share == 1.0 else loss * share
        self.parts[name] = self.parts.get(name, 0.0) + float(weighted.detach())
        return weighted

    def _require_supported(self) -> None:
        """Refuse ways to run in which gradients are not where the projection looks for them."""
        projector = self.projector
        if self.is_deepspeed_enabled and projector is not None:
            raise RecipeError(
                "the projection does not run under DeepSpeed, which hides the gradients",
                remedy="Use DDP or FSDP, or projection: off.",
            )
        if self.processes is not None and projector is not None and projector.alone:
            raise RecipeError(
                "the projector does not know of the other processes",
                found=f"{self.accelerator.num_processes} processes",
                remedy="Make it with process_group=torch.distributed.group.WORLD.",
            )
        if self.is_fsdp_enabled and projector is not None and not projector.sharded:
            raise RecipeError(
                "under FSDP every process holds a part of each parameter",
                remedy="Make the projector with sharded=True, after the model is sharded.",
            )

    def _alone(self, model: Any) -> Any:
        """Keep DDP from averaging while it is run twice: it is done once, for both gradients."""
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            return model.no_sync()
        return contextlib.nullcontext()
