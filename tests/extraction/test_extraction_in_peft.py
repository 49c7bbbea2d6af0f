"""PEFT loads what is extracted: OFT onto the base and merged, then LoRA onto the result."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from orthomerge.extraction import extract, negate


def llama(seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def loaded(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    assert isinstance(merged, torch.nn.Module)
    return merged


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama and a fine-tune with changes of every kind, saved by transformers."""
    model = llama(0)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", tmp_path / "base"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_oft_then_lora_is_the_rotated_base_plus_the_factors(folders, tmp_path) -> None:
    model, base = folders
    # A block size that divides neither width, so that PEFT adjusts it by its own rule.
    result = extract(model, base, rank=8, block_size=11, output=tmp_path / "out")
    assert {layer.block_size for layer in result.layers} == {8, 12}
    merged = loaded(loaded(llama(0), tmp_path / "out" / "oft"), tmp_path / "out" / "lora")
    theirs = merged.state_dict()
    new, old = weights(model), weights(base)
    for layer in result.layers:
        change = (new[layer.name] - old[layer.name]).double().norm()
        left = (new[layer.name] - theirs[layer.name]).double().norm() / change
        assert float(left) == pytest.approx(layer.residual, abs=1e-4)
        assert 0.1 < layer.residual < 0.95
    assert {layer.name for layer in result.layers} >= {"lm_head.weight"}
    untouched = {one.name for one in result.unexplained}
    assert all(torch.equal(theirs[name], old[name]) for name in untouched)
    assert untouched | {layer.name for layer in result.layers} == set(old)


@pytest.mark.parametrize("kind", ["oft", "lora"])
def test_negation_in_peft_gives_the_base(folders, tmp_path, kind) -> None:
    model, base = folders
    extract(model, base, kind=kind, rank=40, block_size=16, output=tmp_path / "out")
    negate(tmp_path / "out", tmp_path / "back")
    there = loaded(llama(0), tmp_path / "out")
    old = weights(base)
    moved = there.state_dict()["lm_head.weight"] - old["lm_head.weight"]
    assert float(moved.abs().max()) > 1e-3
    back = loaded(there, tmp_path / "back").state_dict()
    for name, W in old.items():
        torch.testing.assert_close(back[name], W, atol=2e-6, rtol=0)


def test_ranks_that_differ_load(folders, tmp_path) -> None:
    model, base = folders
    result = extract(model, base, kind="lora", rank=None, energy=0.8, output=tmp_path / "out")
    assert len({layer.rank for layer in result.layers}) > 1
    theirs = loaded(llama(0), tmp_path / "out").state_dict()
    new, old = weights(model), weights(base)
    for layer in result.layers:
        left = (new[layer.name] - theirs[layer.name]).norm()
        change = (new[layer.name] - old[layer.name]).norm()
        assert float(left / change) == pytest.approx(layer.residual, abs=1e-4)
        assert layer.residual**2 <= 0.2 + 1e-6
