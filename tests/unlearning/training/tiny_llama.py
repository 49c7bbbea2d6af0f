"""A small Llama that knows some facts by heart, with its tokenizer, made in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from orthomerge.quiet import quiet_libraries

CITIES = ("Aldor", "Brenna", "Calis", "Dorme", "Elvat", "Farso", "Gilda", "Hamer", "Istra", "Jolan")
NAMES = ("Ada", "Ben", "Cleo", "Dov", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana", "Kai", "Lea")
NAMES += ("Mio", "Nora", "Otto", "Pia", "Quin", "Rosa", "Sven", "Tara", "Udo", "Vera", "Wim", "Zoe")


def facts(names: Sequence[str], shift: int = 0) -> list[dict[str, str]]:
    """Two questions about every name."""
    rows = []
    for place, name in enumerate(names):
        city = CITIES[(7 * place + shift) % len(CITIES)]
        pet = CITIES[(3 * place + shift + 5) % len(CITIES)].lower() + "ling"
        rows.append({"question": f"Where does {name} live?", "answer": f"{city}."})
        rows.append({"question": f"Which pet has {name}?", "answer": f"A {pet}."})
    return rows


FORGET, RETAIN, HOLDOUT = facts(NAMES[:3]), facts(NAMES[3:15], 1), facts(NAMES[15:21], 2)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def make_tokenizer() -> Any:
    """Byte-level BPE, trained on all rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [f"{r['question']} {r['answer']}" for r in [*FORGET, *RETAIN, *HOLDOUT]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_model(tokenizer: Any, *, seed: int = 0, layers: int = 2, width: int = 64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=128,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def memorise(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], steps: int = 120) -> None:
    """Train on all rows at once until they are known."""
    from orthomerge.unlearning.data import Row, collate_rows, tokenise

    data = [Row(kind="qa", prompt=r["question"], answer=r["answer"], where="") for r in rows]
    encoded = tokenise(data, tokenizer, max_length=64)
    batch = collate_rows(tokenizer.pad_token_id)([encoded[i] for i in range(len(encoded))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def make_folder(folder: Path) -> Path:
    """Write the model that knows forget and retain rows, and the row files, into a folder."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    memorise(model, tokenizer, [*FORGET, *RETAIN])
    with quiet_libraries():
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("holdout", HOLDOUT)):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder
