"""Changes of whole models, and of packed OFT adapters, against PEFT's own merges."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from adapter_models import (
    Layers,
    assert_same,
    headers,
    make_adapter,
    our_merge,
    peft_merge,
)

from orthomerge.adapters.sources import open_source
from orthomerge.adapters.updates import adapter_updates
from orthomerge.errors import AdapterError

OFT = ["up", "down", "conv", "embed"]


@pytest.mark.parametrize(
    ("options", "description"),
    [
        ({}, "OFT adapter (packed, Cayley-Neumann series of 5)"),
        ({"num_cayley_neumann_terms": 4}, "OFT adapter (packed, Cayley-Neumann series of 4)"),
        ({"use_cayley_neumann": False}, "OFT adapter (packed, exact Cayley map)"),
        ({"block_share": True}, "OFT adapter (packed, Cayley-Neumann series of 5)"),
        ({"coft": True, "eps": 0.1, "use_cayley_neumann": False}, None),
        ({"modules_to_save": ["head"], "bias": "oft_only"}, None),
    ],
    ids=str,
)
def test_packed_oft(tmp_path: Path, options: dict[str, Any], description: str | None) -> None:
    settings = {"oft_block_size": 4, "target_modules": OFT, **options}
    folder = make_adapter(tmp_path, peft.OFTConfig(**settings), scale=0.1)
    moved = assert_same(our_merge(folder), peft_merge(folder))
    assert {"body.up.weight", "body.down.weight", "conv.weight", "embed.weight"} <= moved
    assert description in (None, open_source(folder).description)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=30,
    )
    return transformers.LlamaForCausalLM(config)


MODELS: list[tuple[Any, Any, int]] = [
    (gpt2, peft.LoraConfig(target_modules=["c_attn", "c_proj", "wte"], use_rslora=True), 7),
    (gpt2, peft.LoraConfig(target_modules=["c_attn", "c_fc"], use_dora=True), 4),
    (llama, peft.LoraConfig(target_modules="all-linear", rank_pattern={"q_proj": 2}), 14),
    (llama, peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=True), 3),
    (llama, peft.OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=8), 4),
    (llama, peft.BOFTConfig(target_modules=["q_proj", "up_proj"], boft_block_size=4), 4),
    (llama, peft.HRAConfig(target_modules=["q_proj", "up_proj"], r=3, init_weights=False), 4),
]


@pytest.mark.parametrize(("build", "config", "count"), MODELS, ids=range(len(MODELS)))
def test_whole_models(tmp_path: Path, build: Any, config: Any, count: int) -> None:
    base = {name: value.clone() for name, value in build().state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(), config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = 0.1 * torch.randn_like(parameter)
                    parameter.add_(noise.abs() if "magnitude" in name else noise)
        model.save_pretrained(tmp_path)
        theirs = model.merge_and_unload().state_dict()
    ours = our_merge(tmp_path, base=base)
    moved = [name for name in base if not torch.equal(base[name], theirs[name])]
    assert len(moved) == count
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-6, rtol=0)


def test_embeddings_of_tied_bases_are_refused(tmp_path: Path) -> None:
    base = headers(dict(Layers().state_dict()))
    for name, config in (
        ("lora", peft.LoraConfig(target_modules=["embed", "up"])),
        ("oft", peft.OFTConfig(target_modules=["embed", "up"], oft_block_size=4)),
    ):
        source = open_source(make_adapter(tmp_path / name, config))
        assert len(adapter_updates(source, base).updates) == 2
        with pytest.raises(AdapterError, match="embedding and output head are one") as caught:
            adapter_updates(source, base, tied=True)
        assert caught.value.tensor == "embed.weight"


def test_multihead_attention_is_refused(tmp_path: Path) -> None:
    """PEFT 0.21 adds the output projection's change twice, when it merges and when it runs."""
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"mha": torch.nn.MultiheadAttention(8, 2)})
    config = peft.LoraConfig(target_modules=["mha"], r=2, init_lora_weights=False)
    peft.get_peft_model(module, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"nn\.MultiheadAttention.*PEFT that trained it"):
        open_source(tmp_path)
