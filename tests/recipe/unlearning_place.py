"""The folder that recipes of unlearning and the documentation speak of, with a tiny model in it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unlearning" / "training"))
from tiny_llama import (
    FORGET,
    HOLDOUT,
    RETAIN,
    make_model,
    make_tokenizer,
    memorise,
    write_rows,
)

from orthomerge.quiet import quiet_libraries

#: What cuts a run to two steps on a few rows.
SMALL = ("train.max_steps=2", "train.batch_size=4", "train.device=cpu", "stop.evaluate_every=2",
         "data.max_length=64", "stop.level=none")  # fmt: skip


def write_unlearning_place(folder: Path) -> Path:
    """Write ``models/tuned``, which knows its rows a little, and ``data/*.jsonl``."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, width=32, layers=1)
    sets = {"forget": FORGET[:4], "retain": RETAIN[:8], "holdout": HOLDOUT[:4]}
    memorise(model, tokenizer, [*sets["forget"], *sets["retain"]], steps=30)
    with quiet_libraries():
        model.save_pretrained(folder / "models" / "tuned")
        tokenizer.save_pretrained(folder / "models" / "tuned")
    (folder / "data").mkdir()
    for name, rows in sets.items():
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    return folder
