"""BOFT and HRA adapters made by PEFT itself: our weights are those of PEFT's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from adapter_models import assert_same, make_adapter, our_merge, peft_merge

from orthomerge.adapters.boft import butterfly_order
from orthomerge.adapters.sources import open_source

TARGETS = ["up", "down", "conv", "point"]


@pytest.fixture
def butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT build several factors, which it otherwise does on CUDA only."""
    from peft.tuners.boft import layer

    class Blocks:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)


@pytest.mark.parametrize(
    "options",
    [
        {"boft_block_size": 2, "boft_n_butterfly_factor": 1},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 3, "target_modules": ["deep"]},
        {"boft_block_size": 6, "boft_n_butterfly_factor": 2, "target_modules": ["conv", "up"]},
        {"boft_block_num": 4, "boft_block_size": 0, "boft_n_butterfly_factor": 1},
        {"boft_block_size": 4, "bias": "boft_only", "modules_to_save": ["head"]},
    ],
    ids=str,
)
def test_boft(tmp_path: Path, butterflies: None, options: dict[str, Any]) -> None:
    folder = make_adapter(tmp_path, peft.BOFTConfig(**{"target_modules": TARGETS, **options}))
    moved = assert_same(our_merge(folder), peft_merge(folder), 3e-6)
    assert any("weight" in name for name in moved)
    assert open_source(folder).description.startswith("BOFT adapter (")


@pytest.mark.parametrize(
    ("size", "block", "levels"), [(8, 2, 3), (16, 4, 3), (24, 2, 3), (12, 6, 2)]
)
def test_butterfly_orders_are_pefts(size: int, block: int, levels: int) -> None:
    from peft.tuners.boft.layer import BOFTLayer

    count = size // block
    for level in range(levels):
        theirs = BOFTLayer.block_butterfly_perm(
            None, size, count // 2**level, block // 2, levels - 1
        )
        assert butterfly_order(size, block, level) == theirs.tolist()


@pytest.mark.parametrize("r", [1, 2, 3, 4])
@pytest.mark.parametrize("orthogonalised", [False, True])
def test_hra(tmp_path: Path, r: int, orthogonalised: bool) -> None:
    config = peft.HRAConfig(
        r=r, apply_GS=orthogonalised, target_modules=TARGETS, init_weights=False
    )
    folder = make_adapter(tmp_path, config)
    moved = assert_same(our_merge(folder), peft_merge(folder), 5e-6)
    assert {"body.up.weight", "body.down.weight", "conv.weight", "point.weight"} == moved


def test_hra_formula_in_double_precision(tmp_path: Path) -> None:
    from adapter_models import Layers
    from safetensors.torch import load_file

    config = peft.HRAConfig(r=4, target_modules=["up"], init_weights=False)
    folder = make_adapter(tmp_path, config)
    (u,) = load_file(folder / "adapter_model.safetensors").values()
    H = np.eye(12)
    for column in u.double().numpy().T:
        v = column / np.sqrt(np.dot(column, column))
        H = H @ (np.eye(12) - 2 * np.outer(v, v))
    expected = Layers().state_dict()["body.up.weight"].double().numpy() @ H
    found = our_merge(folder, torch.float64)["body.up.weight"]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-14, rtol=0)
