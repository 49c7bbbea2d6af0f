"""The callback in a real Trainer: every optimizer step is protected, the short last window too."""

from __future__ import annotations

import copy

import pytest
import tiny_projection as tiny
import torch

from orthomerge.errors import RecipeError, VerificationError
from orthomerge.unlearning import RetainProjectionCallback, RetainProjector

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def retain_loss(model):
    tokens = tiny.batch(1)
    return model(input_ids=tokens, labels=tokens).loss


def train(model, callback, tmp_path, tokens=None, rate=1e-3):
    tokens = tiny.batch(3, rows=14) if tokens is None else tokens
    data = [{"input_ids": row, "labels": row} for row in tokens]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_train_epochs=2,
        learning_rate=rate,
        weight_decay=0.1,
        max_grad_norm=0.5,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


def test_every_step_of_a_trainer_is_protected(model, tmp_path) -> None:
    projector = RetainProjector(model, stage="B", delta_mode="hard")
    callback = RetainProjectionCallback(projector, lambda: [(retain_loss(model), 1.0)])
    trainer = train(model, callback, tmp_path)
    assert trainer.state.global_step == 6  # 7 batches in windows of 3, 3 and 1, twice
    assert projector.projections == projector.corrections == len(callback.history) == 6
    assert max(abs(stats.cos_after) for stats in callback.history) <= 1e-6
    assert max(abs(stats.cos_before) for stats in callback.history) > 1e-2
    trainer.optimizer.step()  # the hooks are gone, so a step needs no window
    assert projector.corrections == 6


def test_a_protected_loss_stays_while_training_would_lower_it(model, tmp_path) -> None:
    start, free = retain_loss(model).item(), copy.deepcopy(model)
    tokens = tiny.batch(1).repeat(2, 1)  # the retain rows themselves
    projector = RetainProjector(model, stage="B", delta_mode="hard")
    callback = RetainProjectionCallback(projector, lambda: [(retain_loss(model), 1.0)])
    train(model, callback, tmp_path, tokens, rate=1e-2)
    train(free, transformers.TrainerCallback(), tmp_path, tokens, rate=1e-2)
    assert retain_loss(free).item() < start - 0.02
    assert abs(retain_loss(model).item() - start) < 0.1 * (start - retain_loss(free).item())


def test_a_dead_hook_is_found_at_the_end(model, tmp_path) -> None:
    projector = RetainProjector(model, stage="B")
    callback = RetainProjectionCallback(projector, lambda: [(retain_loss(model), 1.0)])
    protection = callback.protection
    protection.begin(torch.optim.AdamW(model.parameters()), 0)
    with pytest.raises(VerificationError, match="not every optimizer step"):
        protection.end(1)


def test_a_step_without_retain_losses_is_refused(model, tmp_path) -> None:
    projector = RetainProjector(model, stage="B")
    with pytest.raises(RecipeError, match="no retain gradient"):
        train(model, RetainProjectionCallback(projector, lambda: []), tmp_path)
    with pytest.raises(RecipeError, match="only correct updates"):
        RetainProjectionCallback(RetainProjector(model), lambda: [])
