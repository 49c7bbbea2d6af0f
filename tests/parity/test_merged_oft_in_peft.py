"""Merged OFT adapters that PEFT loads: its merge of ours is our own dense weight (P20)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from oft_models import (
    MODULES,
    Net,
    dense_weights,
    peft_weights,
    read_adapter,
    save_adapter,
)

from orthomerge.adapters import (
    EXACT,
    MergedModule,
    OftAdapter,
    OftConvention,
    adjusted_divisor,
    apply_rotation,
    common_convention,
    merged_oft_config,
    oft_key,
    rotation,
    stored_from_canonical,
)
from orthomerge.linalg import align_blocks, merge_algebra

WIDTHS = {"embed": 12, "body.up": 12, "body.down": 20, "conv": 36}
SERIES = {"use_cayley_neumann": True}
CAYLEY = {"use_cayley_neumann": False}


def write_merged(folder: Path, adapters: list[OftAdapter]) -> dict[str, torch.Tensor]:
    """Merge adapters in the algebra, write what PEFT should load, return the dense weights."""
    from safetensors.torch import save_file

    convention = common_convention(adapters) or EXACT
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, MergedModule] = {}
    dense: dict[str, torch.Tensor] = {}
    for name in sorted({name for one in adapters for name in one.modules}):
        present = [one for one in adapters if name in one.modules]
        As = align_blocks([one.skew(name, torch.float32) for one in present], WIDTHS[name])
        kind = present[0].modules[name].kind
        merged, _ = merge_algebra(As, [1] * len(present))
        shared = len(merged) == 1 and merged.shape[-1] < WIDTHS[name]
        modules[name] = MergedModule(WIDTHS[name], merged.shape[-1], kind, shared)
        tensors[oft_key(name, kind)] = stored_from_canonical(merged, kind, convention)
        weight = Net().state_dict()[f"{name}.weight"]
        R = rotation(merged, convention)
        dense[f"{name}.weight"] = apply_rotation(weight, R, shared=shared, name=name)
    for one in reversed(adapters):
        tensors |= {key: one.source.read(key) for key in one.others.values()}
    config = merged_oft_config(adapters, convention, modules)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return dense


def assert_peft_agrees(folder: Path, dense: dict[str, torch.Tensor]) -> None:
    """What PEFT makes of the merged adapter is what was merged; our reading of it, too."""
    theirs, base = peft_weights(folder), Net().state_dict()
    merged = read_adapter(folder)
    reread = dense_weights(merged)
    assert reread.keys() == dense.keys()
    for name, weight in theirs.items():
        if name in dense:
            torch.testing.assert_close(weight, dense[name], atol=1e-6, rtol=0)
            torch.testing.assert_close(reread[name], dense[name], atol=1e-6, rtol=0)
            assert float((weight - base[name]).abs().max()) > 1e-3
        elif name not in merged.others:
            assert torch.equal(weight, base[name]), name


PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (SERIES, SERIES),
    (CAYLEY, CAYLEY),
    (SERIES, CAYLEY),
    ({"num_cayley_neumann_terms": 3}, {"num_cayley_neumann_terms": 4}),
    ({"num_cayley_neumann_terms": 6}, {"num_cayley_neumann_terms": 6}),
    ({"oft_block_size": 2}, {"oft_block_size": 4}),
    ({"oft_block_size": 12}, {"oft_block_size": 12}),
    ({"r": 2}, {"r": 2}),
    ({"block_share": True}, {"block_share": True}),
    ({"block_share": True}, {}),
    ({"coft": True, "eps": 0.5}, {}),
    ({"target_modules": ["up", "conv"]}, {"target_modules": ["down", "embed"]}),
    ({"target_modules": r"body\..*"}, {"target_modules": ["conv"]}),
    ({"target_modules": ["up", "down"], "exclude_modules": ["down"]}, {"target_modules": ["conv"]}),
    ({"target_modules": ["up"], "modules_to_save": ["head"]}, {"bias": "all"}),
    ({"target_modules": ["up"], "bias": "oft_only"}, {}),
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_peft_merges_our_adapter_to_our_weights(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """P20."""
    folders = [tmp_path / "first", tmp_path / "second"]
    adapters = [
        read_adapter(save_adapter(folder, seed, **options))
        for seed, (folder, options) in enumerate(zip(folders, (first, second), strict=True))
    ]
    dense = write_merged(tmp_path / "merged", adapters)
    assert_peft_agrees(tmp_path / "merged", dense)


@pytest.mark.parametrize("options", [SERIES, CAYLEY, {"block_share": True}], ids=str)
def test_one_adapter_merges_to_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_adapter(tmp_path / "one", seed=3, **options)
    write_merged(tmp_path / "merged", [read_adapter(folder)])
    ours, theirs = peft_weights(tmp_path / "merged"), peft_weights(folder)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0)


def test_whole_modules_and_biases_arrive(tmp_path: Path) -> None:
    one = read_adapter(
        save_adapter(tmp_path / "one", 0, target_modules=["up"], modules_to_save=["head"])
    )
    two = read_adapter(save_adapter(tmp_path / "two", 1, target_modules=["up"], bias="oft_only"))
    assert set(one.others) == {"head.weight", "head.bias"}
    assert set(two.others) == {"body.up.bias"}
    write_merged(tmp_path / "merged", [one, two])
    weights = peft_weights(tmp_path / "merged")
    for adapter in (one, two):
        for name, key in adapter.others.items():
            assert torch.equal(weights[name], adapter.source.read(key))


def test_legacy_adapters_are_written_exactly(tmp_path: Path) -> None:
    """PEFT >= 0.18 would evaluate the old series anew, with a warning; the exact map is safe."""
    folder = save_adapter(tmp_path / "one", seed=0)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["peft_version"]
    path.write_text(json.dumps(values))
    adapter = read_adapter(folder)
    assert adapter.convention == OftConvention(True, 5, legacy=True)
    dense = write_merged(tmp_path / "merged", [adapter])
    assert read_adapter(tmp_path / "merged").convention == EXACT
    assert_peft_agrees(tmp_path / "merged", dense)


def test_layers_to_transform_survives() -> None:
    """Spelled out as full paths, which match those layers and no others."""
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    layers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qk"]
    values = {"target_modules": ["q_proj"], "layers_to_transform": [1, 10]}
    adapter = fake_adapter(["model.layers.1.self_attn.q_proj"], values)
    other = fake_adapter(["model.layers.10.self_attn.k_proj"], {"target_modules": ["k_proj"]})
    modules = {name: MergedModule(8, 4) for one in (adapter, other) for name in one.modules}
    values = merged_oft_config([adapter, other], EXACT, modules, layers)
    config = peft.OFTConfig(**{k: v for k, v in values.items() if k != "peft_type"})
    matched = {name for name in layers if check_target_module_exists(config, name)}
    assert matched == set(modules)


def test_a_path_that_ends_another_path_is_written_as_an_expression() -> None:
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    base = ["encoder.dense", "draft.encoder.dense", "encoderXdense"]
    adapter = fake_adapter(["encoder.dense"], {"target_modules": ["dense"]})
    values = merged_oft_config([adapter], EXACT, {"encoder.dense": MergedModule(8, 4)}, base)
    assert values["target_modules"] == r"encoder\.dense"
    config = peft.OFTConfig(**{k: v for k, v in values.items() if k != "peft_type"})
    assert [name for name in base if check_target_module_exists(config, name)] == base[:1]


def test_peft_knows_every_key_of_the_config() -> None:
    import peft

    adapter = fake_adapter(["up"], {"target_modules": ["up"]})
    values = merged_oft_config([adapter], EXACT, {"up": MergedModule(8, 4)})
    assert set(values) <= set(peft.OFTConfig(target_modules=["up"]).to_dict())


@pytest.mark.parametrize("width", [1, 2, 7, 12, 20, 36, 60, 97, 128])
def test_adjustment_is_pefts(width: int) -> None:
    from peft.tuners.oft.layer import OFTLayer

    for value in range(1, width + 5):
        theirs = value
        if width % value or value > width:
            theirs = OFTLayer.adjust_oft_parameters(None, width, value)
        assert adjusted_divisor(width, value) == theirs


def fake_adapter(names: list[str], values: dict[str, Any]) -> OftAdapter:
    from oft_models import Tensors

    from orthomerge.adapters import AdapterConfig

    tensors = Tensors({oft_key(name, "linear"): torch.zeros(2, 6) for name in names})
    config = AdapterConfig("OFT", {"peft_version": "0.21.2", **values}, Path("config.json"))
    return OftAdapter.from_checkpoint(tensors, config)


def test_all_modules_of_the_model_are_covered() -> None:
    assert set(WIDTHS) == set(MODULES)
