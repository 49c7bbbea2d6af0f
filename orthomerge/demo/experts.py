"""Train the base and the experts and save each as a folder of its own.

Every function returns the model it has written; folders lie below the demo's folder.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from orthomerge.demo.data import CLEAN, Split, in_domain
from orthomerge.demo.evaluation import load_full
from orthomerge.demo.results import (
    ADAPTERS,
    BASE,
    BASE_FOLDER,
    FOLDED,
    FULL,
    FULL_EXPERTS,
    OFT_EXPERTS,
    MadeModel,
)
from orthomerge.demo.settings import DemoSettings, TrainSettings
from orthomerge.demo.training import add_oft, build_model, freeze_head, train

__all__ = ["make_base", "make_full", "make_oft"]


def make_base(out: Path, split: Split, settings: DemoSettings, seed: int) -> MadeModel:
    """Train a model from scratch on the clean digits."""
    start = time.perf_counter()
    model = build_model(settings, seed=seed)
    train(model, _view(split, CLEAN, settings.base, seed), settings.base, seed=seed)
    _save_full(model, out / BASE_FOLDER)
    return MadeModel("base", BASE, BASE_FOLDER, seconds=time.perf_counter() - start)


def make_full(out: Path, domain: str, split: Split, settings: DemoSettings, seed: int) -> MadeModel:
    """Fine-tune all of the base but its head on one domain."""
    start = time.perf_counter()
    path = f"{FULL}/{domain}"
    model = load_full(out / BASE_FOLDER)
    freeze_head(model)
    train(model, _view(split, domain, settings.full, seed), settings.full, seed=seed)
    _save_full(model, out / path)
    return MadeModel(f"{domain} expert", FULL_EXPERTS, path, seconds=time.perf_counter() - start)


def make_oft(out: Path, domain: str, split: Split, settings: DemoSettings, seed: int) -> MadeModel:
    """Train an OFT adapter on one domain; save it, and once more folded into the base by PEFT."""
    start = time.perf_counter()
    path = f"{ADAPTERS}/{domain}"
    model = add_oft(
        load_full(out / BASE_FOLDER), block_size=settings.oft_block_size, base_name=BASE_FOLDER
    )
    train(model, _view(split, domain, settings.oft, seed), settings.oft, seed=seed)
    # False: or PEFT asks the hub whether the base's vocabulary has changed.
    model.save_pretrained(out / path, save_embedding_layers=False)
    _save_full(model.merge_and_unload(), out / FOLDED / domain)
    seconds = time.perf_counter() - start
    return MadeModel(f"{domain} expert", OFT_EXPERTS, path, adapter=True, seconds=seconds)


def _view(split: Split, domain: str, settings: TrainSettings, seed: int) -> Split:
    """Return the split in a domain, with fresh damage for each time an image is seen."""
    draws = math.ceil(settings.steps * settings.batch_size / len(split))
    return in_domain(split, domain, seed=seed, part="train", draws=draws)


def _save_full(model: Any, folder: Path) -> None:
    """Save a full checkpoint under the names its tensors have in memory.

    transformers 5 would otherwise write a ViT under the names of version 4, while PEFT names an
    adapter's tensors after the modules in memory: base and adapter would not fit together. Version
    4 ignores the argument.
    """
    model.save_pretrained(folder, save_original_format=False)
