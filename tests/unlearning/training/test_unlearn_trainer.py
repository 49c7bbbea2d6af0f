"""The trainer against a plain one and against itself in other batches; its projected steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from trainer_runs import (
    arguments,
    cross_entropy,
    even_rows,
    quiet,
    retain_gradients,
    tiny_model,
    trained,
    uneven_rows,
    unlearn_trainer,
)
from transformers import Trainer

from orthomerge.errors import NumericalError
from orthomerge.unlearning.data import PairedRows, collate
from orthomerge.unlearning.objectives import get_objective
from orthomerge.unlearning.training.sessions import _checkpointing
from orthomerge.unlearning.training.windows import window_shares

BATCH = {"rows": ("batch",), "row_dtype": torch.float64, "restore": 0.0}


class PlainTrainer(Trainer):
    """What somebody would write who knows nothing of projections."""

    gamma, alpha = 0.5, 2.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        parts = []
        for name in ("forget", "retain"):
            rows = inputs[name]
            logits = model(
                input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False
            ).logits
            scored = rows["labels"][:, 1:] != -100
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1][scored], rows["labels"][:, 1:][scored], reduction="none"
            )
            parts.append(losses.sum() / losses.numel())
        return self.gamma * -parts[0] + self.alpha * parts[1]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_without_projection_it_is_the_plain_trainer_bit_for_bit(lora, accumulation, tmp_path):
    forget, retain = even_rows(1, 16), even_rows(2, 16)
    options = {
        "gradient_accumulation_steps": accumulation, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "per_device_train_batch_size": 2, "max_steps": 5, "optim": "adamw_torch",
    }  # fmt: skip
    ours = tiny_model(lora=lora)
    trainer, _ = unlearn_trainer(tmp_path, ours, forget, retain, weights=(0.5, 2.0), **options)
    trainer.train()
    theirs = tiny_model(lora=lora)
    plain = PlainTrainer(
        theirs, arguments(tmp_path, **options),
        train_dataset=PairedRows(forget, retain, seed=3), data_collator=collate(1),
    )  # fmt: skip
    quiet(plain).train()
    start = trained(tiny_model(lora=lora))
    for name, parameter in trained(theirs).items():
        assert torch.equal(parameter, trained(ours)[name]), name
        assert not torch.equal(parameter, start[name]), name


def update(model: Any, watch: Any, step: int = 0) -> torch.Tensor:
    pairs = zip(watch.after[step].values(), watch.before[step].values(), strict=True)
    return torch.cat([(after - before).flatten() for after, before in pairs])


@pytest.mark.parametrize(
    ("projection", "rows", "objective", "sizes"),
    [
        (None, even_rows, "grad-diff", (16, 4)),
        (None, uneven_rows, "wga", (16, 4)),
        (BATCH, even_rows, "wga", (16, 4)),
        (BATCH, uneven_rows, "grad-diff", (16, 4, 1)),
    ],
    ids=["off-even", "off-uneven", "on-even", "on-uneven"],
)
def test_one_batch_of_16_steps_like_four_of_4(projection, rows, objective, sizes, tmp_path):
    found = []
    for size in sizes:
        model = tiny_model(torch.float64)
        trainer, watch = unlearn_trainer(
            tmp_path, model, rows(1, 16), rows(2, 16), objective=objective, projection=projection,
            per_device_train_batch_size=size, gradient_accumulation_steps=16 // size,
            max_steps=1, optim="sgd", max_grad_norm=0.1, learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        found.append(update(model, watch))
        assert trainer.parts["retain"] == pytest.approx(
            float(cross_entropy_at(model, watch)), rel=1e-6
        )
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-6 * found[0].norm()
    assert found[0].norm() > 1e-3


def cross_entropy_at(model: Any, watch: Any) -> torch.Tensor:
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(watch.before[0][name])
        return cross_entropy(model, [batch["retain"] for batch in watch.batches[0]])


def test_shares_are_those_of_tokens_or_of_rows():
    forget = uneven_rows(1, 6)
    batches = [
        {"forget": collate(1).rows([forget[i] for i in part])} for part in ([0, 1], [2], [3])
    ]
    for batch in batches:
        batch["retain"] = batch["forget"]
    tokens = window_shares(get_objective("grad-diff").bind(), batches)
    assert [share["forget"] for share in tokens] == [3 / 10, 3 / 10, 4 / 10]  # answers 1+2, 3, 4
    rows = window_shares(get_objective("npo").bind(), batches)
    assert [share["forget"] for share in rows] == [2 / 4, 1 / 4, 1 / 4]
    assert [share["retain"] for share in rows] == [3 / 10, 3 / 10, 4 / 10]
    assert window_shares(get_objective("npo").bind(), batches[:1])[0]["forget"] == 1.0


def test_every_optimizer_step_is_projected_once_also_in_a_short_last_window(tmp_path):
    model = tiny_model()
    trainer, watch = unlearn_trainer(
        tmp_path, model, uneven_rows(1, 10), uneven_rows(2, 10), projection=BATCH,
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=6,
    )  # fmt: skip
    trainer.train()
    assert [len(window) for window in watch.batches] == [4, 1, 4, 1, 4, 1]
    assert trainer.projector.projections == trainer.projector.corrections == 6
    assert trainer.state.global_step == 6


def steps_against(model: Any, watch: Any) -> list[tuple[float, float]]:
    """Return |cos| and cos of every realised step with the window's own retain gradient."""
    cosines = []
    for window, before, after in zip(watch.batches, watch.before, watch.after, strict=True):
        gradient = retain_gradients(model, before, window)
        for name, g in gradient.items():
            delta = after[name] - before[name]
            norms = float(g.norm() * delta.norm())
            cosines.append(float((g * delta).sum()) / norms if norms else 0.0)
    return cosines


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_clipped_hard_step_does_not_move_the_retain_loss(lora, tmp_path):
    model = tiny_model(torch.float64, lora=lora)
    trainer, watch = unlearn_trainer(
        tmp_path, model, uneven_rows(1, 12), uneven_rows(2, 12), weights=(1.0, 0.0),
        projection={**BATCH, "delta_mode": "hard"}, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_steps=5, max_grad_norm=1e-3, optim="sgd",
        learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    assert update(model, watch).norm() == pytest.approx(0.5 * 1e-3, rel=1e-2)  # it was clipped
    assert max(map(abs, steps_against(model, watch))) <= 1e-6


@pytest.mark.parametrize("mode", ["hard", "cone"])
def test_momentum_decay_and_clipping_are_corrected_too(mode, tmp_path):
    model = tiny_model(torch.float64)
    trainer, watch = unlearn_trainer(
        tmp_path, model, uneven_rows(1, 12), uneven_rows(2, 12),
        weights=(1.0, 0.0 if mode == "hard" else 0.5),
        projection={**BATCH, "delta_mode": mode}, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, max_steps=8, max_grad_norm=0.3, weight_decay=0.3,
        optim="adamw_torch", learning_rate=3e-3,
    )  # fmt: skip
    trainer.train()
    cosines = steps_against(model, watch)
    if mode == "hard":
        assert max(map(abs, cosines)) <= 1e-6
    else:
        assert max(cosines) <= 1e-6
        assert min(cosines) < -1e-2  # one-sided: what lowers the retain loss may stay


def test_without_projection_such_steps_do_raise_the_retain_loss(tmp_path):
    """The tests above could not fail if the objectives never were in conflict."""
    model = tiny_model(torch.float64)
    trainer, watch = unlearn_trainer(
        tmp_path, model, uneven_rows(1, 12), uneven_rows(2, 12), weights=(1.0, 0.0),
        per_device_train_batch_size=6, max_steps=8, optim="adamw_torch", learning_rate=3e-3,
    )  # fmt: skip
    trainer.train()
    assert max(steps_against(model, watch)) > 1e-2


def test_gradient_checkpointing_changes_nothing(tmp_path):
    found = []
    for wanted in (False, True):
        model = tiny_model(torch.float64, lora=True)
        trainer, watch = unlearn_trainer(
            tmp_path, model, even_rows(1, 8), even_rows(2, 8), projection=BATCH, max_steps=2,
            **_checkpointing(wanted),
        )  # fmt: skip
        trainer.train()
        found.append(update(model, watch, 1))
    assert (found[1] - found[0]).norm() <= 1e-9 * found[0].norm()


@pytest.mark.parametrize("projection", [None, BATCH], ids=["off", "on"])
def test_a_loss_that_is_not_finite_ends_it_and_says_which(projection, tmp_path):
    model = tiny_model()
    trainer, _ = unlearn_trainer(
        tmp_path, model, even_rows(1, 4), even_rows(2, 4), projection=projection
    )
    with torch.no_grad():
        next(model.parameters())[3] = float("nan")
    with pytest.raises(NumericalError, match=r"the forget loss is not finite at step 1"):
        trainer.train()


def test_what_the_restore_rule_asks_for_does_not_depend_on_the_micro_batches(tmp_path):
    asked = []
    for size in (16, 4):
        model = tiny_model(torch.float64)
        trainer, watch = unlearn_trainer(
            tmp_path, model, uneven_rows(1, 16), uneven_rows(2, 16), max_steps=1,
            projection={**BATCH, "restore": 0.5}, per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size, optim="sgd",
        )  # fmt: skip
        trainer._start_loss = lambda batch: 1.5
        trainer.train()
        asked.append(trainer.projector.last.restoring)
        rise = float(cross_entropy_at(model, watch)) - 1.5
        assert asked[-1] == pytest.approx(0.5 * rise, rel=1e-5)
    assert asked[0] > 0.1


def test_a_scaled_loss_takes_the_same_step(tmp_path):
    """Loss scaling of fp16, without fp16: a CPU has none, but scales all the same."""
    found = []
    for scale in (None, 2.0**12):
        model = tiny_model(torch.float64)
        trainer, watch = unlearn_trainer(
            tmp_path, model, uneven_rows(1, 8), uneven_rows(2, 8), max_steps=2, max_grad_norm=0.0,
            projection={**BATCH, "restore": 0.5}, optim="sgd", learning_rate=0.05,
        )  # fmt: skip
        trainer._start_loss = lambda batch: 1.5
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        found.append(update(model, watch, 1))
    assert (found[1] - found[0]).norm() <= 1e-9 * found[0].norm()
    assert found[0].norm() > 1e-4


@pytest.mark.parametrize("told", [True, False], ids=["one process", "several"])
def test_every_retain_row_is_used_over_the_epochs(told, tmp_path, monkeypatch):
    """Forget sets are small: the pairs must move on from epoch to epoch.

    The loaders that accelerate makes for several processes tell only their sampler the epoch.
    """
    if not told:
        monkeypatch.setattr(
            DataLoaderShard, "set_epoch", lambda self, epoch: setattr(self, "iteration", epoch)
        )
    trainer, watch = unlearn_trainer(
        tmp_path, tiny_model(), even_rows(1, 4), even_rows(2, 12), max_steps=3
    )
    trainer.train()
    batches = [batch for window in watch.batches for batch in window]
    used = [row for batch in batches for row in batch["retain"]["row"].tolist()]
    assert sorted(used) == list(range(12))
