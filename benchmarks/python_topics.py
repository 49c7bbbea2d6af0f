"""Real English text that ships with Python, as forget, retain and holdout rows, and a model of it.

The text is the language's reference that ``help()`` shows (``pydoc_data.topics``). Whole topics go
into one set, so the holdout speaks of things that the model never read about. A paragraph that
several topics share is kept in the shortest of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orthomerge.quiet import quiet_libraries

__all__ = ["SIZES", "Size", "make_model_folder", "topic_rows", "write_sets"]

Rows = dict[str, list[dict[str, str]]]
_ROWS_OF_A_TOPIC = 12  # so that no set is about one thing


@dataclass(frozen=True)
class Size:
    """How much text, and how large a model.

    Attributes:
        rows: Most rows of the forget, the retain and the holdout set.
        characters: Of a row, about.
        vocabulary: Of the tokenizer.
        width: Of the model.
        layers: Of the model.
        epochs: Passes over forget and retain rows.
        steps: Most steps of unlearning.
        bank_rows: Retain rows in the projection's bank.
    """

    rows: tuple[int, int, int]
    characters: int
    vocabulary: int
    width: int
    layers: int
    epochs: int
    steps: int
    bank_rows: int


SIZES = {
    "full": Size((48, 160, 48), 400, 1024, 96, 3, 12, 60, 64),
    "tiny": Size((8, 24, 8), 200, 320, 32, 1, 30, 2, 8),
}


def topic_rows(size: Size, seed: int = 0) -> Rows:
    """Return the rows of every set, each with the topic it is of."""
    topics = _own_paragraphs()
    names = sorted(topics)
    random.Random(f"topics:{seed}").shuffle(names)
    rows: Rows = {"forget": [], "holdout": [], "retain": []}
    most = dict(zip(("forget", "retain", "holdout"), size.rows, strict=True))
    for name in names:
        chosen = next((s for s in rows if len(rows[s]) < most[s]), None)
        if chosen is not None:
            texts = _joined(topics[name], size.characters)[:_ROWS_OF_A_TOPIC]
            rows[chosen] += [{"text": text, "topic": name} for text in texts]
    return {name: found[: most[name]] for name, found in rows.items()}


def write_sets(folder: Path, rows: Rows) -> dict[str, str]:
    """Write one JSON lines file per set; return their paths."""
    paths = {}
    for name, found in rows.items():
        path = folder / f"{name}.jsonl"
        text = "".join(json.dumps({"text": row["text"]}) + "\n" for row in found)
        path.write_text(text, "utf-8")
        paths[name] = str(path)
    return paths


def make_model_folder(folder: Path, rows: Rows, size: Size, seed: int = 0) -> dict[str, Any]:
    """Train a Llama from scratch on forget and retain rows, and save it; return what it took."""
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = {name: [row["text"] for row in found] for name, found in rows.items()}
    tokenizer = _tokenizer([text for found in texts.values() for text in found], size)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=3 * size.width,
            num_hidden_layers=size.layers, num_attention_heads=4, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    loss = _train(model, tokenizer, texts["forget"] + texts["retain"], size.epochs, seed)
    with quiet_libraries():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "epochs": size.epochs, "last_training_loss": loss}


def _own_paragraphs() -> dict[str, list[str]]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for paragraph in topics[name].split("\n\n"):
            known = " ".join(paragraph.casefold().split())
            if known and known not in seen:
                seen.add(known)
                found.setdefault(name, []).append(paragraph)
    return found


def _joined(paragraphs: Sequence[str], characters: int) -> list[str]:
    """Join paragraphs to rows of about so many characters; too short ones are left out."""
    texts, open_text = [], ""
    for paragraph in paragraphs:
        open_text = f"{open_text}\n\n{paragraph}" if open_text else paragraph
        if len(open_text) >= characters // 2:
            texts.append(open_text[: 2 * characters])
            open_text = ""
    return texts


def _tokenizer(texts: Sequence[str], size: Size) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _train(model: Any, tokenizer: Any, texts: Sequence[str], epochs: int, seed: int) -> float:
    """Train with AdamW and a falling learning rate; return the last epoch's mean loss."""
    from orthomerge.unlearning.data import Row, collate_rows, tokenise

    rows = [Row(kind="text", text=text, where=str(at)) for at, text in enumerate(texts)]
    data = tokenise(rows, tokenizer, max_length=512)
    join = collate_rows(tokenizer.pad_token_id)
    order, batch = random.Random(f"train:{seed}"), 8
    steps = epochs * -(-len(data) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    total = 0.0
    for _ in range(epochs):
        places, total = order.sample(range(len(data)), len(data)), 0.0
        for start in range(0, len(places), batch):
            inputs = join([data[place] for place in places[start : start + batch]])
            inputs = {k: inputs[k] for k in ("input_ids", "attention_mask", "labels")}
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * batch
    return total / len(data)
