"""Negated adapters applied by PEFT after the adapter itself: the base comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from adapter_models import Layers, headers, make_adapter, our_merge, peft_merge

from orthomerge.adapters.negation import negated
from orthomerge.adapters.sources import open_source
from orthomerge.errors import AdapterError, NumericalError

OFT = {"oft_block_size": 4, "target_modules": ["up", "down", "conv", "embed"]}
LORA = {"r": 4, "target_modules": ["up", "down", "turned", "conv", "point", "embed"]}
CONFIGS: list[tuple[Any, dict[str, Any]]] = [
    (peft.OFTConfig, {**OFT, "use_cayley_neumann": False}),
    (peft.OFTConfig, {**OFT, "use_cayley_neumann": False, "block_share": True}),
    (peft.OFTConfig, {**OFT, "use_cayley_neumann": False, "coft": True, "eps": 0.3}),
    (peft.BOFTConfig, {"boft_block_size": 4, "target_modules": ["up", "down"]}),
    (peft.HRAConfig, {"r": 3, "target_modules": ["up", "conv"], "init_weights": False}),
    (peft.HRAConfig, {"r": 3, "apply_GS": True, "target_modules": ["up"], "init_weights": False}),
    (peft.LoraConfig, LORA),
    (peft.LoraConfig, {**LORA, "use_rslora": True, "alpha_pattern": {"up": 3}}),
    (peft.LoraConfig, {"target_modules": ["up"], "lora_bias": True}),
]


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged_model(folder: Path) -> torch.nn.Module:
    model = Layers()
    model.load_state_dict(peft_merge(folder))
    return model


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize(("kind", "options"), CONFIGS, ids=str)
def test_adapter_then_negated_adapter_is_the_base(
    tmp_path: Path, kind: Any, options: dict[str, Any]
) -> None:
    folder = make_adapter(tmp_path / "one", kind(**options), scale=0.1)
    inverse = write(tmp_path / "inverse", *negated(open_source(folder)))
    base = dict(Layers().state_dict())
    assert distance(peft_merge(folder), base) > 1e-2
    assert distance(peft_merge(inverse, merged_model(folder)), base) < 1e-6


@pytest.mark.parametrize("terms", [2, 4, 5, 6])
def test_a_series_is_undone_as_far_as_a_rotation_can(tmp_path: Path, terms: int) -> None:
    """Better than the negated series, and no worse than the plain exact map."""
    config = peft.OFTConfig(**OFT, num_cayley_neumann_terms=terms)
    folder = make_adapter(tmp_path / "one", config, scale=0.1)
    stored, values = negated(open_source(folder))
    assert values["use_cayley_neumann"] is False
    plain = load_file(folder / "adapter_model.safetensors")
    rotations = {k: -v for k, v in plain.items() if "oft_" in k}
    own = json.loads((folder / "adapter_config.json").read_text())
    ways = {
        "ours": write(tmp_path / "ours", stored, values),
        "series": write(tmp_path / "series", rotations, own),
        # The same canonical generator: the exact map reads the opposite sign.
        "exact": write(
            tmp_path / "exact",
            {k: -v for k, v in rotations.items()},
            {**own, "use_cayley_neumann": False},
        ),
    }
    base = Layers().state_dict()
    left = {
        way: sum(
            float((merged - base[name]).pow(2).sum())
            for name, merged in peft_merge(path, merged_model(folder)).items()
        )
        for way, path in ways.items()
    }
    assert left["ours"] < 0.9 * left["series"]
    assert left["ours"] <= 1.001 * left["exact"]
    if terms == 4:  # the series also turns too far, which a rotation can undo
        assert left["ours"] < 0.5 * left["exact"]


def test_strength(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "one", peft.LoraConfig(**LORA))
    half = write(tmp_path / "half", *negated(open_source(folder), strength=0.5))
    base, full = Layers().state_dict(), peft_merge(folder)
    for name, weight in peft_merge(half, merged_model(folder)).items():
        torch.testing.assert_close(weight, (base[name] + full[name]) / 2, atol=1e-6, rtol=0)
    twice = make_adapter(tmp_path / "oft", peft.OFTConfig(**OFT, use_cayley_neumann=False))
    tensors, _ = negated(open_source(twice), strength=2)
    plain = load_file(twice / "adapter_model.safetensors")
    assert all(torch.equal(value, -2 * plain[name]) for name, value in tensors.items())
    assert all("base_layer" not in name for name in tensors)


def test_the_limit_of_coft_does_not_cut_what_is_negated_more_than_once(tmp_path: Path) -> None:
    options = {**OFT, "use_cayley_neumann": False, "coft": True, "eps": 0.1}
    source = open_source(make_adapter(tmp_path / "one", peft.OFTConfig(**options)))
    inverse = open_source(write(tmp_path / "inverse", *negated(source, strength=2)))
    assert source.oft is not None
    assert inverse.oft is not None
    for name in source.oft.modules:
        A, back = (one.skew(name, torch.float64) for one in (source.oft, inverse.oft))
        torch.testing.assert_close(back, -2 * A, atol=1e-7, rtol=0)


@pytest.mark.parametrize("layout", ["full", "left"])
def test_old_layouts_are_undone_in_their_own_layout(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    key = "base_model.model.body.up.oft_"
    tensors = {
        f"{key}r": 0.1 * torch.randn(4, 5 if layout == "left" else 3, 5 if layout == "left" else 3)
    }
    config: dict[str, Any] = {"peft_type": "OFT", "r": 4}
    if layout == "full":
        tensors[f"{key}s"] = 1 + 0.1 * torch.randn(20, 1)
        config["oft_block_size"] = 0
    folder = write(tmp_path / "one", tensors, config)
    inverse = write(tmp_path / "inverse", *negated(open_source(folder)))
    once = our_merge(folder, torch.float64)
    back = our_merge(inverse, torch.float64, once)
    base = dict(Layers().state_dict())
    assert distance(once, base) > 1e-2
    assert distance(back, base) < 1e-6
    assert headers(once).keys() == headers(base).keys()


@pytest.mark.parametrize(
    ("kind", "options", "settings", "problem"),
    [
        (peft.LoraConfig, {"target_modules": ["up"], "use_dora": True}, {}, "DoRA divides"),
        (peft.LoraConfig, {"target_modules": ["up"], "bias": "all"}, {}, "replaces whole tensors"),
        (peft.HRAConfig, {"target_modules": ["up"], "r": 2}, {"strength": 0.5}, "as a whole"),
        (peft.LoraConfig, {"target_modules": ["up"]}, {"strength": float("nan")}, "finite"),
    ],
)
def test_what_has_no_inverse_is_refused(
    tmp_path: Path, kind: Any, options: dict[str, Any], settings: dict[str, Any], problem: str
) -> None:
    source = open_source(make_adapter(tmp_path, kind(**options)))
    with pytest.raises(AdapterError, match=problem):
        negated(source, **settings)


def test_zero_scales_have_no_inverse(tmp_path: Path) -> None:
    key = "base_model.model.up.boft_"
    tensors = {f"{key}R": torch.zeros(1, 3, 4, 4), f"{key}s": torch.zeros(20, 1)}
    source = open_source(write(tmp_path / "one", tensors, {"peft_type": "BOFT"}))
    with pytest.raises(NumericalError, match="not positive"):
        negated(source)
    tensors = {f"{key}R": torch.zeros(2, 2, 4, 4), f"{key}s": torch.ones(20, 1)}
    source = open_source(write(tmp_path / "two", tensors, {"peft_type": "BOFT"}))
    with pytest.raises(AdapterError, match="several butterfly factors"):
        negated(source)
