"""Small LoRA adapters on disk, and the dense fp64 changes that are in them."""

from __future__ import annotations

import json
import math

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
SHAPES = {"a.q": (12, 20), "a.v": (8, 20), "b.down": (20, 6)}
CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}


def write(folder, factors, *, biases=None, whole=None, dtype=torch.float64, **config):
    """Write an adapter of ``{module: (B, A, alpha)}``; return its dense changes."""
    tensors = {f"{PREFIX}{name}": value for name, value in (whole or {}).items()}
    rslora = config.get("use_rslora", False)
    dense = {}
    for name, (B, A, alpha) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to(dtype)
        rank = len(A)
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        dense[name] = scale * B.to(dtype).double() @ A.to(dtype).double()
        if biases:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = biases[name]
    content = {
        **CONFIG,
        "r": 1,
        "rank_pattern": {name: len(A) for name, (_, A, _) in factors.items()},
        "alpha_pattern": {name: alpha for name, (_, _, alpha) in factors.items()},
        "target_modules": list(factors),
        "lora_bias": bool(biases),
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return dense


def factors(seed, rank=3, names=tuple(SHAPES), alpha=6.0):
    """Return random factors of falling weight: ``{module: (B, A, alpha)}``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = torch.logspace(0, -1.5, rank, dtype=torch.float64)
    return {
        n: (normal(SHAPES[n][0], rank) * decay, normal(rank, SHAPES[n][1]), alpha) for n in names
    }


def read(folder):
    """Return the dense changes of a merged adapter, biases and whole tensors; check its scale."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert not config["use_rslora"]
    stored = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in [key for key in stored if key.endswith("lora_A.weight")]:
        B = stored.pop(key.replace("lora_A", "lora_B")).double()
        found[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = (
            B @ stored.pop(key).double()
        )
    return found | {key.removeprefix(PREFIX): value for key, value in stored.items()}


def assert_changes(found, wanted, tolerance=1e-12):
    """Check the changes, biases and whole tensors of an adapter."""
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, atol=tolerance, rtol=0)
