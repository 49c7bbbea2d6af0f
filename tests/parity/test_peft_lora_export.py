"""Adapters written from low-rank factors: PEFT loads them, and adds exactly B A."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from adapter_models import Layers, assert_same, our_merge, peft_merge

from orthomerge.adapters.dora import dora_left_factor, dora_magnitudes
from orthomerge.adapters.lora_export import lora_config, lora_key, lora_tensors
from orthomerge.errors import AdapterError

RANKS = {"body.up": 2, "body.down": 3, "conv": 2, "point": 1, "embed": 4, "turned": 2}
OPTIONS = {
    "conv": {"kind": "conv", "kernel": (3, 3)},
    "point": {"kind": "conv", "kernel": (1, 1)},
    "embed": {"kind": "embedding"},
    "turned": {"transposed": True},
}


def write(folder: Path, ranks: dict[str, int]) -> dict[str, torch.Tensor]:
    """Write random factors; return what the weights should become."""
    torch.manual_seed(5)
    weights = dict(Layers().state_dict())
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in ranks.items():
        W = weights[f"{name}.weight"]
        B, A = torch.randn(W.shape[0], rank), torch.randn(rank, W[0].numel())
        tensors |= lora_tensors(name, B, A, **OPTIONS.get(name, {}))
        weights[f"{name}.weight"] = W + (B @ A).reshape(W.shape)
    config = lora_config(ranks, base_model="base", base_modules=modules())
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights


def modules() -> list[str]:
    return [name for name, _ in Layers().named_modules() if name]


@pytest.mark.parametrize("ranks", [RANKS, dict.fromkeys(RANKS, 3), {"body.up": 1}], ids=str)
def test_peft_adds_the_product(tmp_path: Path, ranks: dict[str, int]) -> None:
    wanted = write(tmp_path, ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT says so for every Conv1D it meets, whatever the config says of the others.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target")
        model = peft.PeftModel.from_pretrained(Layers(), tmp_path)
    theirs = dict(model.merge_and_unload().state_dict())
    assert assert_same(theirs, wanted, 3e-6) == {f"{name}.weight" for name in ranks}
    assert_same(our_merge(tmp_path), wanted, 3e-6)


@pytest.mark.parametrize("half", [False, True])
def test_peft_applies_the_magnitudes_of_every_layer_kind(tmp_path: Path, half: bool) -> None:
    """D W0 + B A with D on the output features, which are the columns of what [in, out] stores."""
    torch.manual_seed(6)
    base, wanted, tensors = Layers().state_dict(), dict(Layers().state_dict()), {}
    for name, rank in RANKS.items():
        W = base[f"{name}.weight"]
        turned = name in ("embed", "turned")
        W2 = (W.mT if turned else W).flatten(1)
        B, A = torch.randn(len(W2), rank), torch.randn(rank, W2.shape[1])
        D = 0.5 + torch.rand(len(W2))
        left = dora_left_factor(D, B)
        if half:  # what is stored decides the norms
            left, A = left.bfloat16().float(), A.bfloat16().float()
            B = D[:, None] * left
        m = dora_magnitudes(D, W2, B, A).float()
        factors = (A.mT, left.mT) if turned else (left, A)
        tensors |= lora_tensors(name, *factors, **OPTIONS.get(name, {}), magnitude=m)
        V = D[:, None] * W2 + B @ A
        wanted[f"{name}.weight"] = V.mT if turned else V.reshape(W.shape)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = lora_config(RANKS, base_modules=modules(), dora=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert assert_same(peft_merge(tmp_path), wanted, 3e-6) == {f"{name}.weight" for name in RANKS}
    assert_same(our_merge(tmp_path), wanted, 3e-6)


def test_patterns_match_one_path_only() -> None:
    from peft.utils.other import get_pattern_key

    config = lora_config({"a.q": 2, "b.a.q": 1, "axq": 2, "c": 2})
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^b\.a\.q": 1}
    config = lora_config({"a.q": 1, "b.a.q": 2, "axq": 2, "c": 2})
    found = {
        name: config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], name), config["r"])
        for name in ("a.q", "b.a.q", "axq", "c")
    }
    assert found == {"a.q": 1, "b.a.q": 2, "axq": 2, "c": 2}


def test_peft_knows_every_key_of_the_config() -> None:
    values = lora_config({"up": 2}, task_type="CAUSAL_LM", modules_to_save=["head"])
    assert set(values) <= set(peft.LoraConfig().to_dict())
    assert (values["r"], values["lora_alpha"], values["use_rslora"]) == (2, 2, False)
    assert values["modules_to_save"] == ["head"]


def test_keys_and_refusals() -> None:
    assert lora_key("a", "A") == "base_model.model.a.lora_A.weight"
    assert lora_key("a", "B", "conv") == "base_model.model.a.lora_B.weight"
    assert lora_key("a", "A", "embedding") == "base_model.model.a.lora_embedding_A"
    with pytest.raises(AdapterError, match="rank 1 or more"):
        lora_config({})
    with pytest.raises(AdapterError, match="rank 1 or more"):
        lora_config({"a": 0})
    for B, A in ((torch.ones(3, 2), torch.ones(1, 4)), (torch.ones(3, 0), torch.ones(0, 4))):
        with pytest.raises(AdapterError, match="two factors of one rank"):
            lora_tensors("a", B, A)
