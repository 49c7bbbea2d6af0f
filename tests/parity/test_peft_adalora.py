"""AdaLoRA adapters made by PEFT: our change of every weight is PEFT's own, pruned or not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from adapter_models import Layers, our_merge

from orthomerge.adapters import adapter_states
from orthomerge.adapters.sources import open_source

TARGETS = ["up", "down", "turned", "conv"]
CONVOLUTIONS = hasattr(peft.tuners.adalora.layer, "SVDConv2d")


def trained(fan_in_fan_out: bool = False, **options: Any) -> Any:
    """Return a model with an adapter of random values; each module of other ranks if pruned."""
    targets = ["turned"] if fan_in_fan_out else ["up", "down", *(["conv"] if CONVOLUTIONS else [])]
    config = peft.AdaLoraConfig(
        target_modules=targets,
        init_r=4,
        target_r=2,
        total_step=10,
        fan_in_fan_out=fan_in_fan_out,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Layers(), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def delta(module: nn.Module) -> torch.Tensor:
    """Return PEFT's own change of a weight."""
    change: torch.Tensor = module.get_delta_weight("default").detach()
    return change


def assert_changes(weights: dict[str, torch.Tensor], model: Any) -> int:
    base, count = Layers().state_dict(), 0
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.adalora.AdaLoraLayer):
            ours = weights[f"{name}.weight"] - base[f"{name}.weight"]
            torch.testing.assert_close(ours, delta(module), atol=3e-6, rtol=0)
            count += 1
    return count


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("alpha", [7, 0, -1])
def test_the_change_is_pefts(tmp_path: Path, fan_in_fan_out: bool, alpha: int) -> None:
    model = trained(fan_in_fan_out, lora_alpha=alpha)
    model.save_pretrained(tmp_path)
    wanted = 1 if fan_in_fan_out else 2 + CONVOLUTIONS
    assert assert_changes(our_merge(tmp_path), model) == wanted
    assert assert_changes(our_merge(open_source(adapter_states(model)[0])), model) == wanted


def test_pruned_ranks_keep_the_scale_of_the_first(tmp_path: Path) -> None:
    """As after the last allocation: masked values are 0, and saved without; one module is gone."""
    model = trained(lora_alpha=7)
    masks = {"body.up": [True, False, True, True], "body.down": [False] * 4}
    pattern = {f"{name}.lora_E": mask for name, mask in masks.items()}
    model.peft_config["default"].rank_pattern = pattern
    for name, mask in masks.items():
        layer = model.base_model.model.get_submodule(name)
        with torch.no_grad():
            layer.lora_E["default"][~torch.tensor(mask)] = 0
    with warnings.catch_warnings():  # of the empty tensors
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.lora is not None
    assert source.lora.modules["body.up"].rank == 3
    assert "body.down" not in source.lora.modules
    assert assert_changes(our_merge(source), model) == 2 + CONVOLUTIONS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(Layers(), tmp_path)
    assert assert_changes(our_merge(source), loaded) == 2 + CONVOLUTIONS
