"""A small vision transformer and its experts, trained with ``transformers.Trainer`` and PEFT.

Models in, trained models out; which images they see and where they are saved is decided elsewhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from orthomerge.demo.data import Split
from orthomerge.demo.settings import DemoSettings, TrainSettings
from orthomerge.quiet import quiet_peft

__all__ = [
    "HEAD",
    "add_oft",
    "build_model",
    "freeze_head",
    "target_names",
    "train",
]

# Experts never train the head: what a class looks like in feature space stays the base's, so that
# full fine-tunes and adapters differ in the same layers and a merge has nothing to say about it.
HEAD = "classifier"


def build_model(settings: DemoSettings, *, seed: int) -> Any:
    """Build a randomly initialised vision transformer for 8x8 grey images and ten classes.

    Patches are 2x2, so an image is a sequence of 16 tokens and one class token.
    """
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    return ViTForImageClassification(config)


def target_names(model: Any) -> list[str]:
    """Return the last names of the attention's and MLP's linear layers, without the head.

    They are read off the model because releases of transformers name them differently.
    """
    from torch import nn

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in names} - {HEAD})


def freeze_head(model: Any) -> None:
    """Keep the classifier head as it is while everything else trains."""
    model.get_submodule(HEAD).requires_grad_(False)


def add_oft(model: Any, *, block_size: int, base_name: str) -> Any:
    """Wrap a model with a fresh OFT adapter on its linear layers; only the adapter trains.

    The exact Cayley transform is used, not PEFT's truncated series: each adapter then is a
    rotation of the base's weights and nothing else.

    Args:
        model: The base.
        block_size: Side of the rotation's blocks.
        base_name: What the adapter's config calls its base.
    """
    from peft import OFTConfig, get_peft_model

    config = OFTConfig(
        oft_block_size=block_size,
        target_modules=target_names(model),
        use_cayley_neumann=False,
    )
    model.name_or_path = base_name  # PEFT writes this into the adapter's config
    with quiet_peft():
        return get_peft_model(model, config)


def train(model: Any, split: Split, settings: TrainSettings, *, seed: int) -> None:
    """Train the parameters that require a gradient, in place, on the CPU."""
    from transformers import PrinterCallback, Trainer

    with tempfile.TemporaryDirectory(prefix="orthomerge-demo-") as scratch:
        trainer = Trainer(
            model=model,
            args=_arguments(settings, seed, scratch),
            train_dataset=_Batches(split),
            data_collator=_already_a_batch,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


def _arguments(settings: TrainSettings, seed: int, scratch: str) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=scratch,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=settings.steps // 10,
        weight_decay=0.01,
        seed=seed,
        data_seed=seed,
        use_cpu=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


class _Batches:
    """A map-style dataset that cuts a whole batch at once instead of image by image."""

    def __init__(self, split: Split) -> None:
        import torch

        self._images = torch.from_numpy(split.images).unsqueeze(1)
        self._labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self._images[index], "labels": self._labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = list(indices)
        return {"pixel_values": self._images[rows], "labels": self._labels[rows]}


def _already_a_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
