"""A merged adapter that does not read back as what was merged is not published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orthomerge import merge_lora
from orthomerge.errors import VerificationError
from orthomerge.merging.executors import factor_outputs as executor

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    folders = []
    for at in range(2):
        stream, folder = torch.Generator().manual_seed(at), tmp_path / f"a{at}"
        folder.mkdir()
        tensors = {
            f"{MODULE}.lora_A.weight": torch.randn(4, 24, generator=stream),
            f"{MODULE}.lora_B.weight": torch.randn(32, 4, generator=stream),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


@pytest.mark.parametrize("damage", ["scaled", "negated", "rows swapped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_file_is_not_published(
    damage: str,
    dtype: str,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = executor.lora_tensors

    def wrong(name: str, B: torch.Tensor, A: torch.Tensor, **given: Any) -> dict[str, torch.Tensor]:
        changed = {"scaled": 2 * B, "negated": -B, "rows swapped": B.flip(0)}[damage]
        return right(name, changed, A, **given)

    monkeypatch.setattr(executor, "lora_tensors", wrong)
    with pytest.raises(VerificationError, match="does not read back"):
        merge_lora(
            adapters,
            method="task-arithmetic",
            output=tmp_path / "out",
            output_settings={"dtype": dtype},
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rank", [None, "2"])
def test_rounding_is_no_difference(
    dtype: str, rank: str | None, adapters: list[Path], tmp_path: Path
) -> None:
    for method in ("task-arithmetic", "do-merging", "ties"):
        merge_lora(
            adapters,
            method=method,
            output=tmp_path / method,
            output_settings={"dtype": dtype},
            rank=rank,
        )
        assert (tmp_path / method / "adapter_config.json").is_file()


@pytest.mark.parametrize("method", ["do-merging", "task-arithmetic"])
def test_the_reported_norm_and_energy_are_those_of_the_files(
    method: str, adapters: list[Path], tmp_path: Path
) -> None:
    from orthomerge.adapters.sources import open_source

    norms: dict[int | None, float] = {}
    for cut in (None, 3):
        output = tmp_path / f"out-{cut}"
        result = merge_lora(adapters, method=method, output=output, rank=cut)
        lora = open_source(output).lora
        assert lora is not None
        (name,) = lora.modules
        B, A = lora.factors(name, torch.float64)
        norms[cut] = float(torch.linalg.norm(B @ A))
        (facts,) = result.facts.values()
        assert facts["norm"] == pytest.approx(norms[cut], rel=1e-6)
    assert facts["energy"] == pytest.approx((norms[3] / norms[None]) ** 2, rel=1e-6)
