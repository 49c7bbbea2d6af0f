"""What `inspect` says of adapters that PEFT wrote."""

from __future__ import annotations

import peft
import pytest
import torch

from orthomerge.diagnostics.inspection import inspect_source


class Model(torch.nn.Module):
    """Two layers of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 16)
        self.down = torch.nn.Linear(16, 8)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            peft.LoraConfig(
                target_modules=["up", "down"], r=2, lora_alpha=6, rank_pattern={"down": 4}
            ),
            {"modules": 2, "ranks": [2, 4], "scales": [1.5, 3.0], "whole_tensors": 0},
        ),
        (
            peft.OFTConfig(target_modules=["up", "down"], oft_block_size=4),
            {"modules": 2, "block_sizes": [4], "use_cayley_neumann": True},
        ),
        (peft.HRAConfig(target_modules=["up"], r=2), {"modules": 1, "block_sizes": [8]}),
    ],
    ids=["lora", "oft", "hra"],
)
def test_details_of_an_adapter(config, wanted, tmp_path) -> None:
    peft.get_peft_model(Model(), config).save_pretrained(tmp_path)
    found = inspect_source(tmp_path)
    assert {key: found.details[key] for key in wanted} == wanted
    assert config.peft_type.value.lower() in found.kind.lower()
