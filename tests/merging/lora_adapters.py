"""Small LoRA adapters on disk and in memory, and the dense truth of what they change."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from orthomerge.adapters.memory import AdapterState

__all__ = ["MODULES", "dense_changes", "read_changes", "state", "write_adapter", "write_base"]

MODULES = {f"layers.{layer}.{name}": (12, 8) for layer in range(3) for name in ("q", "k")} | {
    f"layers.{layer}.up": (20, 8) for layer in range(3)
}


def state(seed: int, rank: int, modules=MODULES, **config) -> AdapterState:
    """Return a random adapter with alpha = 2 r."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in modules.items():
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            value = torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = value
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    return AdapterState(tensors, {**settings, **config}, f"adapter {seed}")


def write_adapter(folder: Path, seed: int, rank: int, **config) -> Path:
    """Write what ``state`` returns as a PEFT folder."""
    made = state(seed, rank, **config)
    folder.mkdir(parents=True)
    save_file(dict(made.tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(made.config))
    return folder


def write_base(folder: Path) -> Path:
    """Write a base model with the modules and a norm."""
    generator = torch.Generator().manual_seed(99)
    folder.mkdir(parents=True)
    weights = {f"{m}.weight": torch.randn(s, generator=generator) for m, s in MODULES.items()}
    save_file({**weights, "norm.weight": torch.ones(8)}, folder / "model.safetensors")
    return folder


def dense_changes(made: AdapterState) -> dict[str, torch.Tensor]:
    """Return each module's change in fp64."""
    scale = made.config["lora_alpha"] / made.config["r"]
    return {
        name: scale
        * made.tensors[f"base_model.model.{name}.lora_B.weight"].double()
        @ made.tensors[f"base_model.model.{name}.lora_A.weight"].double()
        for name in MODULES
        if f"base_model.model.{name}.lora_A.weight" in made.tensors
    }


def read_changes(folder: Path) -> dict[str, torch.Tensor]:
    """Return the changes of a written adapter, its scale read as PEFT reads it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in MODULES:
        A = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        alpha = config["alpha_pattern"].get("^" + name.replace(".", "\\."), config["lora_alpha"])
        B = tensors[f"base_model.model.{name}.lora_B.weight"].double()
        found[name] = alpha / len(A) * B @ A
    return found
