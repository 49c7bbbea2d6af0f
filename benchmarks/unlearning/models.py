"""The three models of one world: base, target (knows all authors) and gold (never saw some).

Each is kept in the cache under a digest of everything that made it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unlearning import encoding, facts, pools
from unlearning.encoding import Encoded, collate, encode, train_tokenizer
from unlearning.facts import SIZES, Facts, make_facts

__all__ = ["Scores", "World", "WorldSettings", "load_world", "row_scores"]

_SHAPE = {
    "vocab_size": encoding.VOCABULARY,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_TINY = {**_SHAPE, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96}
_SHAPES = {"tiny": _TINY, "S": _SHAPE, "M": _SHAPE}
_SOURCES = (facts, pools, encoding)


@dataclass(frozen=True)
class Training:
    """How one model is trained: AdamW without weight decay, linear decay after a short warm-up."""

    epochs: int
    learning_rate: float = 2e-3
    batch: int = 16


#: From random weights, on grammar and known rows.
_BASE = Training(4)

#: From the base to target and to gold, by size: long enough to know every row by heart.
_TUNED = {"tiny": Training(6), "S": Training(30), "M": Training(16)}


@dataclass(frozen=True)
class WorldSettings:
    """What a world depends on, beside the code.

    Args:
        size: A name of ``SIZES``.
        seed: Of the facts, the initial weights and the order of training.
    """

    size: str
    seed: int


@dataclass(frozen=True)
class World:
    """Facts, their tokens and where the models are."""

    settings: WorldSettings
    facts: Facts
    rows: Mapping[str, list[Encoded]]
    folders: Mapping[str, Path]
    seconds: Mapping[str, float]

    def model(self, name: str) -> Any:
        """Return a fresh copy of ``base``, ``target`` or ``gold``, without dropout."""
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(self.folders[name]).eval()


def load_world(cache: Path, settings: WorldSettings) -> World:
    """Return a world; train what the cache does not hold."""
    made = make_facts(SIZES[settings.size], settings.seed)
    taught = (*made.grammar, *made.known)
    tokenizer = train_tokenizer(taught)  # has seen no author: no name is a token of the target only
    rows = {name: encode(part, tokenizer) for name, part in made.named().items()}
    base_rows = [*rows["grammar"], *rows["known"]]
    gold_rows = [*rows["retain"], *rows["known"]]
    target_rows = [*rows["retain"], *rows["forget"], *rows["known"]]
    base = _trained(cache, "base", base_rows, _BASE, settings, None)
    how = _TUNED[settings.size]
    folders = {"base": base}
    for name, own in (("target", target_rows), ("gold", gold_rows)):
        folders[name] = _trained(cache, name, own, how, settings, base)
    seconds = {name: _seconds(folder) for name, folder in folders.items()}
    for folder in folders.values():
        if not (folder / "tokenizer.json").exists():
            tokenizer.save_pretrained(folder)
    return World(settings, made, rows, folders, seconds)


def _seconds(folder: Path) -> float:
    return float(json.loads((folder / "made.json").read_text())["cpu_seconds"])


def _trained(
    cache: Path,
    name: str,
    rows: Sequence[Encoded],
    how: Training,
    settings: WorldSettings,
    start: Path | None,
) -> Path:
    """Return the folder of one model, from the cache or trained now."""
    identity = {
        "name": name,
        "rows": hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest(),
        "how": asdict(how),
        "seed": settings.seed,
        "start": start.name if start else None,
        "shape": _SHAPES[settings.size],
        "sources": _sources(),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache / "unlearning" / f"{name}-{digest[:16]}"
    if (folder / "made.json").exists():
        return folder
    started = time.process_time()
    model = _train(rows, how, settings, start)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    made = {**identity, "cpu_seconds": round(time.process_time() - started, 1)}
    (partial / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


def _sources() -> str:
    """Return a digest of the code that makes rows, tokens and models, and of what it runs on."""
    import transformers

    files = [Path(str(module.__file__)) for module in _SOURCES] + [Path(__file__)]
    total = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    total.update(f"{torch.__version__} {transformers.__version__}".encode())
    return total.hexdigest()


def _train(
    rows: Sequence[Encoded], how: Training, settings: WorldSettings, start: Path | None
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

    set_seed(settings.seed)
    if start is None:
        model = LlamaForCausalLM(LlamaConfig(**_SHAPES[settings.size]))
    else:
        model = LlamaForCausalLM.from_pretrained(start)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=_arguments(how, settings.seed, scratch),
            train_dataset=list(range(len(rows))),
            data_collator=lambda places: _without_row(collate(rows, places)),
        )
        trainer.train()
    return model


def _without_row(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "row"}


def _arguments(how: Training, seed: int, scratch: str) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=how.epochs,
        learning_rate=how.learning_rate,
        per_device_train_batch_size=how.batch,
        warmup_steps=10,
        weight_decay=0.0,
        adam_beta2=0.95,
        seed=seed,
        data_seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


@dataclass(frozen=True)
class Scores:
    """How well a model knows some rows.

    Args:
        losses: Each row's mean loss over its answer's tokens, fp64: [rows].
        exact: Whether every token of the answer is the model's first choice: [rows].
    """

    losses: torch.Tensor
    exact: torch.Tensor

    @property
    def loss(self) -> float:
        """The mean over the rows."""
        return float(self.losses.mean())


def row_scores(model: Any, rows: Sequence[Encoded], batch: int = 64) -> Scores:
    """Return what a model makes of the answers of rows."""
    losses, exact = [], []
    with torch.no_grad():
        for first in range(0, len(rows), batch):
            part = collate(rows, range(first, min(first + batch, len(rows))))
            found = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
            logits, labels = found.logits[:, :-1].float(), part["labels"][:, 1:]
            scored = labels != -100
            picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
            losses.append(-(picked.squeeze(-1).double() * scored).sum(1) / scored.sum(1))
            exact.append(((logits.argmax(-1) == labels) | ~scored).all(1))
    return Scores(torch.cat(losses), torch.cat(exact))
