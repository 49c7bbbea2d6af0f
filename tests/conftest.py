"""Settings that every test runs under, and factories for small checkpoints on disk."""

from __future__ import annotations

import os

# Before torch, transformers or huggingface_hub is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "orthomerge",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("orthomerge")

StateDict = Mapping[str, torch.Tensor]
INDEX_NAME = "model.safetensors.index.json"


@pytest.fixture
def state_dict() -> dict[str, torch.Tensor]:
    """Return a small model: several dtypes and ranks, a 0-dim and an empty tensor."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.embed_tokens.weight": normal(10, 4),
        "model.layers.0.up.weight": normal(6, 4).to(torch.bfloat16),
        "model.layers.1.up.weight": normal(6, 4).to(torch.bfloat16),
        "model.layers.1.up.bias": normal(6).to(torch.float16),
        "model.norm.weight": normal(5).double(),
        "model.scale": torch.tensor(0.5),
        "model.empty": torch.empty(0, 3),
        "model.position_ids": torch.arange(7),
    }


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes one safetensors file under ``tmp_path``."""

    def write(name: str, tensors: StateDict) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path, {"format": "pt"})
        return path

    return write


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a model folder, in shards with an index if asked for."""

    def write(
        name: str, tensors: StateDict, *, shards: int = 1, config: Mapping[str, Any] | None = None
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        names = list(tensors)
        weight_map: dict[str, str] = {}
        for part in range(shards):
            filename = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
            filename = "model.safetensors" if shards == 1 else filename
            own = names[part::shards]
            save_file({key: tensors[key] for key in own}, folder / filename, {"format": "pt"})
            weight_map |= dict.fromkeys(own, filename)
        if shards > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index))
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write
