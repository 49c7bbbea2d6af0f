"""Small batches and models that the tests of the objectives share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: What an objective without sensible defaults needs to be bound.
REQUIRED: dict[str, dict[str, Any]] = {"pdu": {"tolerance": 0.5, "warmup_epochs": 0.0}}

VOCABULARY = 40

_FORGET = [([3, 9, 4, 7, 8, 30], 3), ([5, 6, 11, 12], 2), ([21, 22, 23, 24, 25], 1)]
_ALTERNATE = [([3, 9, 4, 33], 3), ([5, 6, 34, 35, 36], 2), ([21, 33, 34], 1)]
_RETAIN = [([31, 13, 14], 1), ([2, 15, 16, 17, 18], 2), ([1, 19, 20, 1], 2)]

Rows = Sequence[tuple[Sequence[int], int]]


class ListedRows:
    """A tokenised set as the data room makes it."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        ids, prompt = self._rows[place]
        return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids[prompt:])}


SETS = {"forget": ListedRows(_FORGET), "alternate": ListedRows(_ALTERNATE)}


def token_batch(rows: Rows, *, more: int = 0, places: Sequence[int] | None = None) -> Any:
    """Join rows of (tokens, length of the prompt), with ``more`` columns of padding than needed."""
    length = max(len(ids) for ids, _ in rows) + more
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
        "row": torch.tensor(list(range(len(rows)) if places is None else places)),
    }
    for place, (ids, prompt) in enumerate(rows):
        batch["input_ids"][place, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][place, : len(ids)] = 1
        batch["labels"][place, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return batch


def unlearning_batch(*, more: int = 0, places: Sequence[int] = (0, 1, 2)) -> Any:
    """Return a batch of all three parts, of the rows at ``places``, in that order."""
    parts = {"forget": _FORGET, "alternate": _ALTERNATE, "retain": _RETAIN}
    return {
        name: token_batch([rows[place] for place in places], more=more, places=places)
        for name, rows in parts.items()
    }


def without_answer(batch: Any, place: int) -> Any:
    """Return a batch in which one row of every part has no scored token."""
    changed = {name: dict(part) for name, part in batch.items()}
    for part in changed.values():
        part["labels"] = part["labels"].clone()
        part["labels"][place] = -100
    return changed


def selected(batch: Any, places: Sequence[int]) -> Any:
    """Return some rows of every part of a batch."""
    return {
        name: {key: value[list(places)] for key, value in part.items()}
        for name, part in batch.items()
    }


def tiny_llama(*, layers: int = 2, seed: int = 0, dropout: float = 0.0) -> Any:
    """Return a Llama of 16 dimensions with weights large enough to tell tokens apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_dropout=dropout,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def tiny_gpt2() -> Any:
    """Return a GPT-2 with dropout, whose modules are called nothing like a Llama's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=3, n_head=2,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def with_adapter(model: Any, kind: str = "lora", **options: Any) -> Any:
    """Put a new adapter on the attention's projections."""
    from peft import LoraConfig, OFTConfig, get_peft_model

    targets = {"target_modules": ["q_proj", "v_proj"]}
    config = (
        LoraConfig(r=2, **targets, **options)
        if kind == "lora"
        else OFTConfig(r=0, oft_block_size=4, **targets, **options)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def moved(model: Any, *, by: float = 0.05, seed: int = 1) -> Any:
    """Add noise to everything that is trained; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(by * noise.to(parameter.dtype))
    return model


def copied(batch: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return a batch with storage of its own."""
    return {name: {k: v.clone() for k, v in part.items()} for name, part in batch.items()}
