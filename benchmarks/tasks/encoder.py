"""The sentence encoder, its zero-shot classifiers and how they are scored.

A text's logits are 20 times the cosines between its mean-pooled embedding and the *base* encoder's
embeddings of the label prompts. No task has a head of its own, so that base, experts and merges
differ in the encoder alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tasks.splits import Split, Task

__all__ = ["HEAD", "TARGETS", "Encoder", "Scores", "Tokens", "load_base", "quiet_transformers"]

#: Ends of the names of the linear maps that experts change: 36 of them.
TARGETS = ("query", "key", "value", "dense")

#: How a text becomes logits.
HEAD = {"scale": 20.0, "max_tokens": 32}

_BATCH = 64


def quiet_transformers() -> None:
    """Keep transformers from drawing progress bars and from looking at the network."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_base(folder: Path) -> tuple[Any, Any]:
    """Return the base model, in fp32 and in evaluation mode, and its tokenizer."""
    from transformers import AutoTokenizer, BertModel

    quiet_transformers()
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.float().eval(), tokenizer


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, shortest first, in batches, with where each came from."""

    batches: tuple[dict[str, Tensor], ...]
    order: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Scores:
    """What a classifier did on one split.

    Args:
        correct: One boolean per text, in the split's order.
        loss: Mean cross-entropy.
    """

    correct: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of correct texts."""
        return float(self.correct.double().mean())


class Encoder:
    """The base model with its heads; weights of ``TARGETS`` can be exchanged in place.

    Args:
        folder: Of the base model.
        tasks: By name.
        device: Where to compute.
        bf16: Whether scoring runs in bf16 autocast; without hardware for it that is slower.
    """

    def __init__(
        self, folder: Path, tasks: Mapping[str, Task], device: str = "cpu", *, bf16: bool = False
    ) -> None:
        self.folder = folder
        self.bf16 = bf16
        self.device = torch.device(device)
        self.model, self.tokenizer = load_base(folder)
        self.model.to(self.device)
        self.base = {
            name: module.weight.detach().clone()
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(TARGETS)
        }
        with torch.no_grad():
            self.heads = {
                name: embed(self.model, self.encode(task.prompts)) for name, task in tasks.items()
            }

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return one padded batch of token ids."""
        batch = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=int(HEAD["max_tokens"]),
            padding=True,
            return_tensors="pt",
        )
        return {key: value.to(self.device) for key, value in batch.items()}

    def tokens(self, split: Split) -> Tokens:
        """Tokenise a split once, texts of like length together."""
        lengths = [len(ids) for ids in self.tokenizer(list(split.texts))["input_ids"]]
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        batches = tuple(
            self.encode([split.texts[i] for i in order[start : start + _BATCH]])
            for start in range(0, len(order), _BATCH)
        )
        return Tokens(batches, torch.tensor(order), torch.tensor(split.labels))

    def set_weights(self, update: Mapping[str, Tensor], strength: float = 1.0) -> None:
        """Set every target to base + strength × update; targets without an update to the base."""
        with torch.no_grad():
            for name, weight in self.base.items():
                target = self.model.get_submodule(name).weight
                target.copy_(weight)
                if name in update:
                    target.add_(update[name].to(self.device), alpha=strength)

    @torch.no_grad()
    def score(self, task: str, tokens: Tokens) -> Scores:
        """Classify a split with the current weights."""
        rows = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for batch in tokens.batches:
                rows.append(logits(self.model, batch, self.heads[task]))
        scores = torch.empty(len(tokens.labels), rows[0].shape[1])
        scores[tokens.order] = torch.cat(rows).float().cpu()
        loss = F.cross_entropy(scores.double(), tokens.labels)
        return Scores(scores.argmax(1) == tokens.labels, float(loss))

    def batches(self, split: Split, size: int, draw: torch.Generator) -> Iterator[Any]:
        """Yield endless (batch, labels), every text once per round, in a new order each round."""
        labels = torch.tensor(split.labels)
        while True:
            order = torch.randperm(len(labels), generator=draw)
            for rows in order.split(size):
                if len(rows) == size:
                    texts = [split.texts[i] for i in rows.tolist()]
                    yield self.encode(texts), labels[rows].to(self.device)


def embed(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return unit vectors: the mean of a text's token states, padding left out."""
    states = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def logits(model: Any, batch: Mapping[str, Tensor], head: Tensor) -> Tensor:
    """Return one row of label scores per text."""
    return HEAD["scale"] * (embed(model, batch)[:, None] * head).sum(-1)  # fp32, also in autocast
