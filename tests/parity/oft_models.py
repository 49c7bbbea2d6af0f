"""Tiny models, OFT adapters that PEFT makes for them, and what the library reads of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthomerge.adapters import OftAdapter, apply_rotation, read_adapter_config, rotation
from orthomerge.checkpoints.header import TensorInfo

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}


class Tensors:
    """A state dict seen as a checkpoint; counts what is read."""

    origin = "adapter"

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values
        self.reads = 0
        self.tensors = {
            name: TensorInfo(name, _NAMES[value.dtype], tuple(value.shape))
            for name, value in values.items()
        }

    def read(self, name: str) -> torch.Tensor:
        self.reads += 1
        return self.values[name]


class Net(nn.Module):
    """A linear layer of 12, one of 20 columns, an embedding and a convolution of 4 * 9."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 12)
        self.body = nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)})
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


MODULES = ("embed", "body.up", "body.down", "conv")


@contextmanager
def _adjusting() -> Iterator[None]:
    """Let PEFT say that it adjusts a block size, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Invalid `(oft_block_size|r)`")
        yield


def save_adapter(folder: Path, seed: int, scale: float = 0.1, **options: Any) -> Path:
    """Let PEFT make an OFT adapter of ``Net``, fill it with random numbers and save it."""
    import peft

    settings = {"target_modules": ["embed", "up", "down", "conv"], "oft_block_size": 4}
    if "r" in options:
        settings["oft_block_size"] = 0
    config = peft.OFTConfig(**{**settings, **options})
    with _adjusting():
        model = peft.get_peft_model(Net(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_" in name:
                parameter.copy_(scale * torch.randn_like(parameter))
            elif "modules_to_save" in name or (config.bias != "none" and name.endswith("bias")):
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def peft_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of ``Net`` after PEFT loaded and merged the adapter in ``folder``."""
    import peft

    with _adjusting():
        model = peft.PeftModel.from_pretrained(Net(), folder)
    return dict(model.merge_and_unload().state_dict())


def read_adapter(folder: Path) -> OftAdapter:
    """Read an adapter folder with the library."""
    from safetensors.torch import load_file

    tensors = Tensors(load_file(folder / "adapter_model.safetensors"))
    return OftAdapter.from_checkpoint(tensors, read_adapter_config(folder))


def dense_weights(adapter: OftAdapter, back_map: Any = "as_trained") -> dict[str, torch.Tensor]:
    """Return the library's effective weights of all rotated modules of ``Net``."""
    base = Net().state_dict()
    out = {}
    for name, module in adapter.modules.items():
        R = rotation(adapter.skew(name, torch.float32), adapter.convention, back_map)
        weight = base[f"{name}.weight"]
        out[f"{name}.weight"] = apply_rotation(weight, R, shared=module.shared, name=name)
    return out
