"""Adapters of a loaded PEFT model: read without a file, they are the ones PEFT would save."""

from __future__ import annotations

import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from adapter_models import Layers, assert_same, our_merge, peft_merge

from orthomerge.adapters import AdapterState, adapter_states
from orthomerge.adapters.sources import open_source, source_files
from orthomerge.errors import AdapterError, UnknownNameError

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "turned", "embed"]}


def model_with(*configs: peft.PeftConfig, names: tuple[str, ...] = ("default", "default_2")) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Layers(), configs[0], adapter_name=names[0])
        for config, name in zip(configs[1:], names[1:], strict=False):
            model.add_adapter(name, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(mark in name for mark in ("lora_", "oft_", "modules_to_save")):
                parameter.add_(0.3 * torch.randn_like(parameter).abs())
    return model


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(**LORA),
        peft.LoraConfig(**LORA, use_rslora=True, rank_pattern={"up": 2}, modules_to_save=["head"]),
        peft.LoraConfig(**LORA, use_dora=True, task_type="FEATURE_EXTRACTION"),
        peft.LoraConfig(r=2, target_modules=["up", "conv"], lora_bias=True),
        peft.OFTConfig(oft_block_size=4, target_modules=["up", "down"]),
    ],
    ids=["plain", "patterns", "dora", "bias", "oft"],
)
def test_memory_and_disk_give_the_same_weights(tmp_path: Path, config: peft.PeftConfig) -> None:
    other = peft.LoraConfig(r=1, target_modules=["up"])
    model = model_with(config, other) if config.peft_type == "LORA" else model_with(config)
    state = adapter_states(model, "default")[0]
    source = open_source(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, selected_adapters=["default"])
    disk = open_source(tmp_path)
    stored = set(disk.checkpoint.tensors) - {"base_model.model.embed.base_layer.weight"}
    assert set(source.checkpoint.tensors) == stored
    ours = our_merge(source)
    assert_same(ours, our_merge(disk), 0)
    assert_same(ours, peft_merge(tmp_path), 3e-6)
    assert (source.origin, source.description) == ("default", disk.description)
    assert source_files(source) == ()


def test_all_adapters_come_in_order_and_without_copies() -> None:
    model = model_with(peft.LoraConfig(**LORA), peft.LoraConfig(r=1, target_modules=["down"]))
    states = adapter_states(model)
    assert [state.name for state in states] == ["default", "default_2"]
    assert [one.name for one in adapter_states(model, ["default_2"])] == ["default_2"]
    first, second = (open_source(state).lora for state in states)
    assert first is not None
    assert second is not None
    assert set(first.modules) == {"body.up", "turned", "embed"}
    assert {name: module.rank for name, module in second.modules.items()} == {"body.down": 1}
    A = states[0].tensors["base_model.model.body.up.lora_A.weight"]
    live = model.base_model.model.body["up"].lora_A["default"].weight
    assert A.data_ptr() == live.data_ptr()
    assert not A.requires_grad


def test_the_config_is_what_json_would_give() -> None:
    import json

    model = model_with(
        peft.LoraConfig(**LORA, task_type="FEATURE_EXTRACTION", exclude_modules={"x"})
    )
    (state,) = adapter_states(model)
    assert json.loads(json.dumps(state.config)) == state.config
    assert state.config["peft_type"] == "LORA"
    assert state.config["task_type"] == "FEATURE_EXTRACTION"
    assert state.config["target_modules"] == ["embed", "turned", "up"]
    lora = open_source(AdapterState(state.tensors, model.peft_config["default"].to_dict())).lora
    assert lora is not None  # PEFT's own enums and sets
    assert lora.config.names("target_modules") == ("embed", "turned", "up")


def test_models_without_a_wrapper_are_taken() -> None:
    """As after ``add_adapter`` of transformers or diffusers: the names lack PEFT's prefix."""
    base = Layers()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up"]), base, "mine")
    base.peft_config = {"mine": peft.LoraConfig(r=2, target_modules=["up"])}
    lora = open_source(adapter_states(base)[0]).lora
    assert lora is not None
    assert set(lora.modules) == {"body.up"}


def test_an_adapter_called_like_a_module_is_not_lost_silently() -> None:
    configs = [peft.LoraConfig(r=1, target_modules=["up"]) for _ in range(2)]
    model = model_with(*configs, names=("default", "body"))
    with pytest.raises(AdapterError, match=r"called like a module.*expected 2 tensors") as caught:
        adapter_states(model)
    assert caught.value.file == "default"
    assert caught.value.remedy


def test_shared_storage_is_read_as_it_is() -> None:
    """One tensor under two names, and a view of a larger one."""
    whole = torch.randn(4, 8)
    A, B = whole[:2, :4], whole.T[:3, 1:3]
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": value
        for name in ("q", "k")
        for factor, value in (("A", A), ("B", B))
    }
    config = {"peft_type": peft.PeftType.LORA, "r": 2, "lora_alpha": 2}
    lora = open_source(AdapterState(tensors, config)).lora
    assert lora is not None
    for name in ("q", "k"):
        left, right = lora.factors(name, torch.float64)
        torch.testing.assert_close(left @ right, B.double() @ A.double())


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"has no PEFT adapters.*found Layers"):
        adapter_states(Layers())
    model = model_with(peft.LoraConfig(**LORA))
    with pytest.raises(UnknownNameError, match="Did you mean 'default'"):
        adapter_states(model, "defaul")

    class Kind(Enum):
        WRONG = 3

    wrong: list[Any] = [{}, {"peft_type": Kind.WRONG}, [1]]
    for config in wrong:
        with pytest.raises(AdapterError, match="not the config of a PEFT adapter") as caught:
            open_source(AdapterState({}, config, "mine"))
        assert caught.value.file == "mine"
    with pytest.raises(AdapterError, match="the config says OFT, the tensors are those of LORA"):
        open_source(AdapterState(adapter_states(model)[0].tensors, {"peft_type": "OFT"}))
