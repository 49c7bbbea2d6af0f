"""Training of experts: one per task and seed, kept in the cache under its settings' hash."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from tasks.encoder import HEAD, TARGETS, Encoder, load_base, logits
from tasks.splits import TASKS, Examples, Split

__all__ = ["KINDS", "ExpertSettings", "Kind", "expert_folder", "train_expert"]


@dataclass(frozen=True)
class ExpertSettings:
    """Everything an expert depends on, beside the base and the texts.

    Args:
        kind: A name of ``KINDS``.
        task: What it is trained on.
        seed: Of the order of the training texts.
        init: Seed of the adapter's own random start.
        learning_rate: At the first step; falls linearly to zero.
        steps: Optimizer steps.
        batch: Texts per step.
    """

    kind: str
    task: str
    seed: int
    init: int
    learning_rate: float
    steps: int = 60
    batch: int = 16


@dataclass(frozen=True)
class Kind:
    """One way of fine-tuning.

    Args:
        settings: What it is, for the hash and the report.
        prepare: Makes a base model trainable.
        learning_rate: The usual one.
    """

    settings: dict[str, Any]
    prepare: Callable[[Any, dict[str, Any]], Any]
    learning_rate: float


def _lora(model: Any, settings: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=list(TARGETS), **settings))


#: The kinds of experts; another one is another line here and in ``families``.
KINDS: dict[str, Kind] = {
    "lora": Kind({"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}, _lora, 1e-3),
}


def _identity(settings: ExpertSettings, train: Split) -> dict[str, Any]:
    texts = json.dumps([train.texts, train.labels])
    return {
        **asdict(settings),
        "kind_settings": KINDS[settings.kind].settings,
        "targets": list(TARGETS),
        "head": {**HEAD, "prompts": TASKS[settings.task].prompts},
        "texts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
    }


def expert_folder(cache: Path, settings: ExpertSettings, train: Split) -> Path:
    """Return where an expert is kept; it is there if ``expert.json`` is."""
    text = json.dumps(_identity(settings, train), sort_keys=True)
    name = f"{settings.kind}-{settings.task}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return cache / "experts" / name


def train_expert(
    cache: Path, settings: ExpertSettings, examples: Examples, encoder: Encoder
) -> Path:
    """Train one expert unless the cache holds it.

    AdamW without weight decay, linear decay of the learning rate, cross-entropy of the zero-shot
    classifier's logits, in fp32.

    Returns:
        Its folder, in PEFT's own layout plus ``expert.json``.
    """
    folder = expert_folder(cache, settings, examples["train"])
    if (folder / "expert.json").exists():
        return folder
    started = time.perf_counter()
    losses, model = _trained(settings, examples["train"], encoder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    report = {
        **_identity(settings, examples["train"]),
        "seconds": round(time.perf_counter() - started, 1),
        "first_losses": losses[:10],
        "last_losses": losses[-10:],
    }
    (partial / "expert.json").write_text(json.dumps(report, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


def _trained(settings: ExpertSettings, train: Split, encoder: Encoder) -> tuple[list[float], Any]:
    kind = KINDS[settings.kind]
    torch.manual_seed(settings.init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = kind.prepare(load_base(encoder.folder)[0].to(encoder.device), kind.settings)
    model.train()
    _without_dropout(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    head = encoder.heads[settings.task]
    draw = torch.Generator().manual_seed(settings.seed)
    batches = encoder.batches(train, settings.batch, draw)
    losses = []
    for _ in range(settings.steps):
        batch, labels = next(batches)
        loss = F.cross_entropy(logits(model, batch, head), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(round(float(loss.detach()), 4))
    return losses, model.eval()


def _without_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
