"""LoRA adapters made by PEFT itself: our change of every weight is that of PEFT's own merge."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from adapter_models import Layers, assert_same, headers, make_adapter, our_merge, peft_merge
from safetensors.torch import load_file

from orthomerge.adapters.dora import dora_scales
from orthomerge.adapters.lora_settings import lora_alpha
from orthomerge.adapters.sources import open_source
from orthomerge.adapters.updates import adapter_updates

LINEAR = ["up", "down", "turned"]
EVERYTHING = [*LINEAR, "conv", "point", "embed"]
CASES: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"r": 1, "lora_alpha": 3},
    {"r": 30, "lora_alpha": 2},
    {"rank_pattern": {"up": 2, r"^body\.down": 5}, "alpha_pattern": {"body.up": 1, "conv": 7}},
    {"alpha_pattern": {"(up|down)": 6}, "use_rslora": True},
    {"target_modules": LINEAR, "use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"target_modules": ["up", "down", "conv"], "lora_bias": True},
    {"target_modules": ["up"], "modules_to_save": ["head"]},
    {"target_modules": ["up", "conv"], "bias": "all"},
    {"target_modules": ["up", "conv"], "bias": "lora_only"},
    {"target_modules": ["up"], "init_lora_weights": "orthogonal"},
]


def save(folder: Path, **options: Any) -> Path:
    settings = {"target_modules": EVERYTHING, "r": 4, "lora_alpha": 6, **options}
    return make_adapter(folder, peft.LoraConfig(**settings))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_base_plus_delta_is_pefts_merge(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every layer kind, scale, pattern, magnitude and bias."""
    folder = save(tmp_path, **options)
    moved = assert_same(our_merge(folder), peft_merge(folder), 3e-6)
    targets = options.get("target_modules", EVERYTHING)
    base = Layers().state_dict()
    wanted = {n for n in base if n.endswith("weight") and n.split(".")[-2] in targets}
    assert wanted <= moved
    assert len(moved) == len(wanted) or {"lora_bias", "modules_to_save", "bias"} & set(options)


@pytest.mark.parametrize("dora", [False, True])
def test_formula_in_double_precision(tmp_path: Path, dora: bool) -> None:
    """W = m (W0 + alpha / sqrt(r) B A) / norms, written out for a linear layer and a Conv1D."""
    folder = save(tmp_path, target_modules=LINEAR, use_dora=dora, use_rslora=True)
    stored = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    ours, base = our_merge(folder, torch.float64), Layers().state_dict()
    for name, turned in (("body.up", False), ("body.down", False), ("turned", True)):
        prefix = f"base_model.model.{name}.lora_"
        V = base[f"{name}.weight"].double()
        V = V.T if turned else V
        V = V + 6 / math.sqrt(4) * stored[f"{prefix}B.weight"] @ stored[f"{prefix}A.weight"]
        if dora:
            m = stored[f"{prefix}magnitude_vector"]
            V = m[:, None] * V / V.pow(2).sum(1, keepdim=True).sqrt()
        expected = V.T if turned else V
        torch.testing.assert_close(ours[f"{name}.weight"], expected, atol=1e-14, rtol=0)


def test_the_split_of_dora_is_pefts_merge_in_double_precision(tmp_path: Path) -> None:
    """D W0 + (D B) A, D on the features PEFT has norms of, in every layer kind."""
    folder = save(tmp_path, use_dora=True)
    model = Layers().double()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in loaded.named_parameters():
                if "lora_" in name:  # which PEFT made in the default dtype
                    parameter.data = parameter.data.double()
        theirs = loaded.merge_and_unload().state_dict()
    adapter = open_source(folder).lora
    assert adapter is not None
    assert len(adapter.modules) == 6
    for name in adapter.modules:
        W0 = base[f"{name}.weight"]
        turned = name in ("turned", "embed")
        B, A = adapter.factors(name, torch.float64)
        if name == "embed":
            B, A = A.mT, B.mT
        m = adapter.magnitude(name, torch.float64)
        assert m is not None
        rows = (W0.mT if turned else W0).flatten(1)
        D = dora_scales(rows, m, B, A)[:, None]
        ours = D * rows + (D * B) @ A
        ours = ours.mT if turned else ours.reshape(W0.shape)
        torch.testing.assert_close(ours, theirs[f"{name}.weight"], atol=1e-14, rtol=0)


def test_factors_are_the_change_in_both_orientations(tmp_path: Path) -> None:
    source = open_source(save(tmp_path))
    base = Layers().state_dict()
    for name, update in adapter_updates(source, headers(base)).updates.items():
        shape = tuple(base[name].shape)
        B, A = update.factors(torch.float64)
        assert B.shape[1] == A.shape[0] == 4
        delta = update.delta(None, shape, torch.float64)
        torch.testing.assert_close((B @ A).reshape(shape), delta, atol=0, rtol=0)
        assert not update.needs_base
        assert update.read_bytes == 4 * (A.numel() + B.numel())
    assert source.lora is not None
    B, A = source.lora.factors("turned", torch.float64)  # out x r, r x in, whatever the layer does
    assert (B.shape, A.shape) == ((10, 4), (4, 12))
    assert source.description == "LoRA adapter (rank 4)"


@pytest.mark.parametrize("module", ["a.q", "b.a.q", "aq", "a.qq", "xa.q"])
@pytest.mark.parametrize(
    "patterns", [{"q": 3, "a.q": 5}, {"a.q": 5, "q": 3}, {"^a.q": 5}, {"a.*": 2}, {"q|k": 9}]
)
def test_scale_is_pefts(module: str, patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    from orthomerge.adapters import AdapterConfig

    values = {"lora_alpha": 16, "alpha_pattern": patterns}
    config = AdapterConfig("LORA", values, Path("a.json"))
    theirs = patterns.get(get_pattern_key(patterns.keys(), module), 16)
    assert lora_alpha(config, module) == theirs


def test_half_precision_adapters_are_lifted_before_they_are_multiplied(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save(tmp_path, target_modules=["up"])
    path = folder / "adapter_model.safetensors"
    half = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(half, path)
    source = open_source(folder)
    (update,) = adapter_updates(source, headers(Layers().state_dict())).updates.values()
    B, A = (half[f"base_model.model.body.up.lora_{factor}.weight"].double() for factor in "BA")
    exact = 1.5 * B @ A
    found = update.delta(None, (20, 12), torch.float32)
    assert float((found - exact).abs().max()) < 1e-6 < float((exact - exact.bfloat16()).abs().max())


def test_square_weights_follow_the_config_and_refuse_a_contradiction(tmp_path: Path) -> None:
    from orthomerge.errors import AdapterError

    folder = save(tmp_path, target_modules=["square", "turned"])
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values["fan_in_fan_out"] is True
    assert_same(our_merge(folder), peft_merge(folder), 3e-6)
    path.write_text(json.dumps({**values, "fan_in_fan_out": False}))
    with pytest.raises(AdapterError, match="is square, and the other modules contradict"):
        our_merge(folder)
