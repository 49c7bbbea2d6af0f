"""From rows to tensors: a byte-level tokenizer trained on the spot, and answer-only batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearning.facts import Row

__all__ = ["VOCABULARY", "Encoded", "collate", "encode", "prompt_of", "train_tokenizer"]

VOCABULARY = 1024
_IGNORED = -100

#: input_ids, attention_mask, labels: [rows, tokens]; row: [rows].
TokenBatch = dict[str, Tensor]


def prompt_of(question: str) -> str:
    """Return what stands before an answer."""
    return f"{question}\n"


def train_tokenizer(rows: Iterable[Row]) -> Any:
    """Return a byte-level BPE tokenizer of ``VOCABULARY`` tokens that was trained on the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (prompt_of(row["question"]) + row["answer"] for row in rows)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@dataclass(frozen=True)
class Encoded:
    """One tokenised row: the prompt's labels are ignored."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def encode(rows: Sequence[Row], tokenizer: Any) -> list[Encoded]:
    """Tokenise rows; an answer ends with the end-of-text token, which is part of it."""
    found = []
    for row in rows:
        prompt = tokenizer.encode(prompt_of(row["question"]))
        answer = [*tokenizer.encode(row["answer"]), tokenizer.eos_token_id]
        found.append(Encoded((*prompt, *answer), (_IGNORED,) * len(prompt) + tuple(answer)))
    return found


def collate(rows: Sequence[Encoded], places: Sequence[int]) -> TokenBatch:
    """Return the rows at the given places as one batch, padded on the right.

    Args:
        rows: A set.
        places: Indices into it; kept as ``row``.
    """
    chosen = [rows[place] for place in places]
    length = max(len(row.input_ids) for row in chosen)
    shape = (len(chosen), length)
    ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, _IGNORED)
    mask = torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(chosen):
        count = len(row.input_ids)
        ids[i, :count] = torch.tensor(row.input_ids)
        labels[i, :count] = torch.tensor(row.labels)
        mask[i, :count] = 1
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "row": torch.tensor(places),
    }  # fmt: skip
