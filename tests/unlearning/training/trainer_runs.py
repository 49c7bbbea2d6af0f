"""An UnlearnTrainer on a very small model and random rows, in float64 where it matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from orthomerge.unlearning.data import PairedRows, collate
from orthomerge.unlearning.objectives import get_objective
from orthomerge.unlearning.projection import RetainProjector
from orthomerge.unlearning.training import UnlearnTrainer

VOCABULARY = 40


class RandomRows:
    """Rows of random tokens, the last ones of which are scored."""

    def __init__(self, seed: int, lengths: Sequence[int], answers: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name, self.items = f"set {seed}", []
        for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
            labels = [-100] * (length - answer) + ids[length - answer :]
            self.items.append({"input_ids": ids, "labels": labels, "row": row})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def even_rows(seed: int, count: int) -> RandomRows:
    return RandomRows(seed, [8] * count, [3] * count)


def uneven_rows(seed: int, count: int) -> RandomRows:
    return RandomRows(seed, [5 + i % 7 for i in range(count)], [1 + i % 4 for i in range(count)])


def tiny_model(dtype: torch.dtype = torch.float32, *, lora: bool = False) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    ).to(dtype)  # fmt: skip
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(model, config).to(dtype)
        with torch.no_grad():  # a zero B makes the gradients of A zero
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "remove_unused_columns": False, "label_names": ["labels"],
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False, "seed": 7, "data_seed": 7,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


def quiet(trainer: Trainer) -> Trainer:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


class Watch(TrainerCallback):
    """Keep the parameters before and after every step, and the batches of its window."""

    def __init__(self, model: Any) -> None:
        self.model, self.before, self.after = model, [], []
        self.batches: list[list[Any]] = []
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before.append({n: p.detach().clone() for n, p in trained(self.model).items()})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.after.append({n: p.detach().clone() for n, p in trained(self.model).items()})
        if self.trainer.projector is not None:
            self.trainer.projector.end_window()


def trained(model: Any) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def unlearn_trainer(
    folder: Path,
    model: Any,
    forget: Any,
    retain: Any,
    *,
    objective: str = "grad-diff",
    weights: tuple[float, float] = (1.0, 1.0),
    projection: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Any, Watch]:
    """A trainer that remembers its windows, and what watches it."""
    bound = get_objective(objective).bind(forget_weight=weights[0], retain_weight=weights[1])
    projector = None if projection is None else RetainProjector(model, **projection)
    watch = Watch(model)
    trainer = quiet(
        _Remembering(
            model, arguments(folder, **changes), objective=bound, projector=projector,
            train_dataset=PairedRows(forget, retain, seed=3), data_collator=collate(1),
            callbacks=[watch],
        )
    )  # fmt: skip
    watch.trainer = trainer
    return trainer, watch


class _Remembering(UnlearnTrainer):
    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        found = super().get_batch_samples(*args, **options)
        watch = next(c for c in self.callback_handler.callbacks if isinstance(c, Watch))
        watch.batches.append(found[0])
        return found


def cross_entropy(model: Any, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Mean over all scored tokens of several batches, from the definition."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in rows:
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits.double()
        logs = logits.log_softmax(-1)
        for row, labels in enumerate(batch["labels"]):
            for place in range(1, len(labels)):
                if labels[place] != -100:
                    total = total - logs[row, place - 1, labels[place]]
                    count += 1
    return total / count


def retain_gradients(model: Any, values: dict[str, Any], window: Sequence[Any]) -> dict[str, Any]:
    """Gradients of the window's retain loss at given parameters."""
    now = {n: p.detach().clone() for n, p in trained(model).items()}
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(values[name])
    model.zero_grad()
    cross_entropy(model, [batch["retain"] for batch in window]).backward()
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in trained(model).items()
    }
    model.zero_grad()
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(now[name])
    return found
