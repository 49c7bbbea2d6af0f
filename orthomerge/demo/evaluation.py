"""Load a saved model and count how often it is right.

Models are loaded as a user would load them: ``from_pretrained`` on the folder, and PEFT for
adapters. The transformers and peft packages are known to be installed by the time this runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orthomerge.demo.data import CLEAN, Images, Labels, Split
from orthomerge.demo.results import BASE_FOLDER, DemoRow, MadeModel
from orthomerge.quiet import quiet_peft

__all__ = ["load_adapter", "load_full", "measure", "predict"]


def load_full(folder: Path) -> Any:
    """Load a full checkpoint folder."""
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder).eval()


def load_adapter(base: Path, folder: Path) -> Any:
    """Load an adapter folder on top of a base, both as PEFT does it."""
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(load_full(base), folder).eval()


def predict(model: Any, images: Images) -> Labels:
    """Return the class with the largest logit for each image."""
    import torch

    with torch.inference_mode():
        logits = model(pixel_values=torch.from_numpy(images).unsqueeze(1)).logits
    return np.asarray(logits.argmax(-1).numpy(), dtype=np.int64)


def measure(model: MadeModel, out: Path, tests: Mapping[str, Split]) -> DemoRow:
    """Load a model of the demo and return the fraction of right predictions on each test.

    Args:
        model: A model below ``out``.
        out: The demo's folder.
        tests: The clean test images first, then those of each domain.
    """
    folder = out / model.path
    loaded = load_adapter(out / BASE_FOLDER, folder) if model.adapter else load_full(folder)
    accuracy = {
        name: float(np.mean(predict(loaded, test.images) == test.labels))
        for name, test in tests.items()
    }
    domains = [value for name, value in accuracy.items() if name != CLEAN]
    return DemoRow(model, accuracy, sum(domains) / len(domains))
