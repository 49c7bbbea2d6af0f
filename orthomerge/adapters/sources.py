"""Recognise what a checkpoint is by its content: a full model, or an adapter and of which kind.

Only tensor names, adapter_config.json and what stands for it in formats without one are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orthomerge.adapters.adalora import read_adalora
from orthomerge.adapters.boft import BoftAdapter
from orthomerge.adapters.config import CONFIG_NAME, AdapterConfig, read_adapter_config
from orthomerge.adapters.hra import HraAdapter
from orthomerge.adapters.lora import LoraAdapter
from orthomerge.adapters.lora_files import read_lora_file
from orthomerge.adapters.lora_styles import file_style
from orthomerge.adapters.memory import AdapterState, state_config
from orthomerge.adapters.oft import OftAdapter
from orthomerge.adapters.rotated import RotationAdapter
from orthomerge.checkpoints.reader import Checkpoint
from orthomerge.checkpoints.sources import CheckpointSource, open_checkpoint
from orthomerge.checkpoints.state_dict import StateDictCheckpoint
from orthomerge.errors import AdapterError

__all__ = ["Source", "open_source", "source_files"]

_ADAPTER_MARKS = {
    "OFT": (".oft_R", ".oft_r", ".oft_s", ".oft_embedding_R"),
    "LORA": (".lora_A", ".lora_B", ".lora_embedding_A", "lora_down.", "lora_up."),
    "BOFT": (".boft_R", ".boft_s"),
    "HRA": (".hra_u",),
    "IA3": (".ia3_l",),
    "VERA": (".vera_lambda",),
    "LOHA": (".hada_w",),
    "LOKR": (".lokr_w",),
}


# Kinds whose tensors carry the names of another kind.
_NAMESAKES = {"LORA": ("ADALORA", "XLORA")}
_ROTATIONS: dict[str, type[OftAdapter | BoftAdapter | HraAdapter]] = {
    "OFT": OftAdapter,
    "BOFT": BoftAdapter,
    "HRA": HraAdapter,
}
_LOW_RANK: dict[str, Callable[[Checkpoint, AdapterConfig], LoraAdapter]] = {
    "LORA": LoraAdapter.from_checkpoint,
    "ADALORA": read_adalora,
}


@dataclass(frozen=True)
class Source:
    """An opened checkpoint and what it is.

    Args:
        checkpoint: Its tensors.
        kind: ``"full"``, ``"OFT"``, or another adapter's PEFT type.
        rotations: The parsed adapter, for OFT, BOFT and HRA.
        lora: The parsed adapter, for LoRA and AdaLoRA.
    """

    checkpoint: Checkpoint
    kind: str
    rotations: RotationAdapter | None = None
    lora: LoraAdapter | None = None

    @property
    def oft(self) -> OftAdapter | None:
        """The parsed adapter, for OFT."""
        return self.rotations if isinstance(self.rotations, OftAdapter) else None

    @property
    def origin(self) -> str:
        """Where it came from, as the user wrote it."""
        return self.checkpoint.origin

    @property
    def description(self) -> str:
        """What it is, in words."""
        if self.kind == "full":
            return "full checkpoint"
        parsed = self.rotations or self.lora
        return f"{self.kind} adapter" if parsed is None else parsed.description


def open_source(source: CheckpointSource | AdapterState) -> Source:
    """Open a checkpoint and recognise its kind.

    Args:
        source: File, folder, hub name, state dict, or an adapter in memory.

    Raises:
        CheckpointError: It cannot be opened.
        AdapterError: It is an adapter and its adapter_config.json is missing or contradicts it.
    """
    if isinstance(source, AdapterState):
        checkpoint: Checkpoint = StateDictCheckpoint(source.tensors, source.name)
        return _adapter(checkpoint, state_config(source), _marked_kind(checkpoint))
    checkpoint = open_checkpoint(source)
    style = file_style(checkpoint.tensors, checkpoint.metadata, file=checkpoint.origin)
    if style in ("kohya", "diffusers") and not _is_configured(checkpoint):
        return Source(checkpoint, "LORA", lora=read_lora_file(checkpoint, style))
    marked = _marked_kind(checkpoint)
    config = _adapter_config(checkpoint, marked)
    return Source(checkpoint, "full") if config is None else _adapter(checkpoint, config, marked)


def _adapter(checkpoint: Checkpoint, config: AdapterConfig, marked: str | None) -> Source:
    if marked and config.peft_type not in (marked, *_NAMESAKES.get(marked, ())):
        raise AdapterError(
            f"the config says {config.peft_type}, the tensors are those of {marked}",
            file=checkpoint.origin,
            remedy="Put the adapter_config.json that belongs to this adapter beside it.",
        )
    kind = config.peft_type
    if kind in _ROTATIONS:
        rotations = _ROTATIONS[kind].from_checkpoint(checkpoint, config)
        return Source(checkpoint, kind, rotations=rotations)
    read = _LOW_RANK.get(kind)
    return Source(checkpoint, kind, lora=None if read is None else read(checkpoint, config))


def _marked_kind(checkpoint: Checkpoint) -> str | None:
    """Return the PEFT type that the tensor names betray."""
    for kind, marks in _ADAPTER_MARKS.items():
        if any(mark in name for name in checkpoint.tensors for mark in marks):
            return kind
    return None


def _adapter_config(checkpoint: Checkpoint, marked: str | None) -> AdapterConfig | None:
    folder = checkpoint.folder
    has_config = folder is not None and (folder / CONFIG_NAME).is_file()
    if folder is not None and has_config and (marked or _is_adapter_file(checkpoint)):
        return read_adapter_config(folder)
    if marked:
        raise AdapterError(
            f"these are {marked} adapter tensors, but there is no {CONFIG_NAME} beside them",
            file=checkpoint.origin,
            remedy=f"Put its {CONFIG_NAME} into the same folder: it says how to read them.",
        )
    return None


def _is_configured(checkpoint: Checkpoint) -> bool:
    """Return whether PEFT named the file, and its config is there."""
    folder = checkpoint.folder
    has_config = folder is not None and (folder / CONFIG_NAME).is_file()
    return has_config and _is_adapter_file(checkpoint)


def _is_adapter_file(checkpoint: Checkpoint) -> bool:
    return any(path.name.startswith("adapter_model") for path in checkpoint.files)


def source_files(source: Source) -> tuple[Path, ...]:
    """Return every path whose overwriting would destroy the source."""
    folder = source.checkpoint.folder
    named_a_file = any(source.origin == str(path) for path in source.checkpoint.files)
    return source.checkpoint.files + ((folder,) if folder and not named_a_file else ())
