"""What follows every step of an UnlearnTrainer: was it corrected, and what is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments

from orthomerge.errors import VerificationError
from orthomerge.unlearning.data import PairedRows, collate
from orthomerge.unlearning.objectives import get_objective
from orthomerge.unlearning.projection import RetainProjector
from orthomerge.unlearning.training import UnlearnTrainer
from orthomerge.unlearning.training.callbacks import UnlearnCallback
from orthomerge.unlearning.training.keeping import Snapshot
from orthomerge.unlearning.training.stopping import Reading, StopRule

ROWS = {"rows": ("batch",), "restore": 0.0}


class RandomSet:
    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(2, 30, (8, 6), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.ids[row], "labels": self.ids[row], "row": row}


def run(folder, optimizer_class=None, **changes):
    """Train for a few steps; returns the trainer, its callback and the reports of its steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "remove_unused_columns": False, "label_names": ["labels"],
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    reports: list[Any] = []
    callback = UnlearnCallback(
        lambda step: Reading(step, float(step), None),
        StopRule(None, 1.0, None, Reading(0, 0.0, None)),
        Snapshot(model),
        every=1,
        report=reports.append,
    )
    options = {}
    if optimizer_class is not None:
        options["optimizers"] = (optimizer_class(model.parameters(), lr=1e-2), None)
    trainer = UnlearnTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **(settings | changes)),
        objective=get_objective("grad-diff").bind(),
        projector=RetainProjector(model, **ROWS),
        train_dataset=PairedRows(RandomSet(1), RandomSet(2), seed=3),
        data_collator=collate(1),
        callbacks=[callback],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    callback.trainer = trainer
    return trainer, callback, reports


def test_an_optimizer_of_ones_own_is_corrected_too(tmp_path) -> None:
    trainer, _, _ = run(tmp_path, torch.optim.AdamW)
    trainer.train()
    assert trainer.projector.corrections == trainer.projector.projections == 4


class Hookless(torch.optim.SGD):
    """An optimizer that steps without calling the hooks of torch."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)

    step.hooked = True  # type: ignore[attr-defined]


def test_a_dead_hook_ends_training_at_the_first_step(tmp_path) -> None:
    trainer, _, reports = run(tmp_path, Hookless)
    with pytest.raises(VerificationError, match="hook"):
        trainer.train()
    assert not reports


def test_the_reported_learning_rate_is_that_of_the_step(tmp_path) -> None:
    trainer, _, reports = run(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=4)
    used = []
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    trainer.train()
    assert used[1] > 0
    assert [report.learning_rate for report in reports] == used
