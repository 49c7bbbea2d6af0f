"""A small model with every kind of layer, adapters that PEFT makes for it, and both readings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthomerge.adapters.sources import Source, open_source
from orthomerge.adapters.updates import adapter_updates
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.sources import open_checkpoint


class Layers(nn.Module):
    """Linear layers of several shapes, GPT-2's Conv1D, convolutions, an embedding, a head."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 12)
        self.body = nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)})
        self.turned = Conv1D(10, 12)
        self.square = Conv1D(12, 12)
        self.conv = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(4, 6, 1)
        self.deep = nn.Linear(16, 3)
        self.head = nn.Linear(12, 3)


def make_adapter(folder: Path, config: Any, seed: int = 1, scale: float = 0.3) -> Path:
    """Let PEFT make an adapter of ``Layers``, add random numbers to its parameters, save it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Layers(), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = scale * torch.randn_like(parameter)
                    parameter.add_(noise.abs() if "magnitude" in name else noise)
        model.save_pretrained(folder)
    return folder


def peft_merge(folder: Path, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Return the weights of ``Layers`` after PEFT loaded and merged an adapter."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model or Layers(), folder)
        return dict(loaded.merge_and_unload().state_dict())


def our_merge(
    folder: Path | Source, dtype: torch.dtype = torch.float32, base: Any = None
) -> dict[str, torch.Tensor]:
    """Return base plus the library's changes, and its replacements."""
    source = folder if isinstance(folder, Source) else open_source(folder)
    weights = dict(Layers().state_dict()) if base is None else dict(base)
    found = adapter_updates(source, headers(weights))
    for name, update in found.updates.items():
        W0 = weights[name].to(dtype)
        weights[name] = W0 + update.delta(W0, tuple(W0.shape), dtype)
    for name, key in found.replacements.items():
        weights[name] = source.checkpoint.read(key)
    return weights


def headers(weights: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Return the headers of a state dict."""
    return dict(open_checkpoint(weights).tensors)


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-6
) -> set[str]:
    """Check all weights; return the names of those that differ from the base."""
    base = Layers().state_dict()
    assert ours.keys() == theirs.keys()
    moved = set()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].to(weight.dtype), weight, atol=tolerance, rtol=0)
        if float((weight - base[name]).abs().max()) > 1e-3:
            moved.add(name)
    return moved
