"""Writing kohya's and diffusers' formats: read back they are the same change; names convert."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orthomerge.adapters import (
    FlattenedNames,
    converted_module,
    diffusers_metadata,
    lora_key,
    lora_tensors,
)
from orthomerge.adapters.lora_styles import LoraStyle
from orthomerge.adapters.sources import open_source
from orthomerge.errors import AdapterError

LAYERS: dict[str, dict[str, Any]] = {
    "mid_block.attn.to_q": {},
    "mid_block.resnet.conv1": {"kind": "conv", "kernel": (3, 3)},
    "mid_block.proj_in": {"kind": "conv", "kernel": (1, 1)},
}


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back(tmp_path, style: LoraStyle, dtype: torch.dtype) -> None:
    tensors: dict[str, torch.Tensor] = {}
    wanted, ranks = {}, {}
    for place, (path, options) in enumerate(LAYERS.items()):
        rank = (2, 301, 3)[place]  # bfloat16 has no 301; alpha must not be rounded
        n = 5 * torch.Size(options.get("kernel", (1,))).numel()
        B, A = torch.randn(7, rank).to(dtype), torch.randn(rank, n).to(dtype)
        name = converted_module(path, "peft", style, component="unet")
        tensors |= lora_tensors(name, B, A, style=style, **options)
        wanted[name], ranks[name] = B.double() @ A.double(), rank
    metadata = diffusers_metadata(ranks) if style == "diffusers" else None
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    lora = open_source(tmp_path / "x.safetensors").lora
    assert lora is not None
    assert lora.style == style
    for name, exact in wanted.items():
        B, A = lora.factors(name, torch.float64)
        torch.testing.assert_close(B @ A, exact, atol=0, rtol=0)
        assert lora.modules[name].scale == 1
    alphas = [float(value) for key, value in tensors.items() if key.endswith(".alpha")]
    assert alphas == ([2, 301, 3] if style == "kohya" else [])


def test_keys_are_the_formats_own() -> None:
    """As sd-scripts and diffusers write them."""
    flat, dotted = "lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder.layers.0.fc1"
    assert lora_key(flat, "A", style="kohya") == f"{flat}.lora_down.weight"
    assert lora_key(flat, "B", "conv", style="kohya") == f"{flat}.lora_up.weight"
    assert lora_key(flat, "alpha", style="kohya") == f"{flat}.alpha"
    assert lora_key(dotted, "B", style="diffusers") == f"{dotted}.lora_B.weight"
    magnitude = f"{dotted}.lora_magnitude_vector"
    assert lora_key(dotted, "magnitude", style="diffusers") == magnitude


def test_diffusers_metadata_is_a_config_that_peft_takes() -> None:
    peft = pytest.importorskip("peft")
    ranks = {"unet.a.q": 2, "unet.a.k": 2, "unet.b.q": 5, "text_encoder.q": 3}
    written = json.loads(diffusers_metadata(ranks)["lora_adapter_metadata"])
    own = {k.removeprefix("unet."): v for k, v in written.items() if k.startswith("unet.")}
    config = peft.LoraConfig(**own)
    assert (config.r, config.lora_alpha, config.alpha_pattern) == (2, 2, {r"^b\.q": 5})
    assert written["text_encoder.r"] == 3
    with pytest.raises(AdapterError, match="no module name of diffusers's"):
        diffusers_metadata({"a.q": 1})


@pytest.mark.parametrize(
    ("style", "module", "part", "kind", "problem"),
    [
        ("kohya", "unet.mid_block.to_q", "A", "linear", "is no module name of kohya's"),
        ("kohya", "mid_block_to_q", "A", "linear", "is no module name of kohya's"),
        ("peft", "lora_unet_mid_block_to_q", "A", "linear", "is no module name of peft's"),
        ("diffusers", "lora_unet_x", "A", "linear", "is no module name of diffusers's"),
        ("diffusers", "mid_block.to_q", "A", "linear", "is no module name of diffusers's"),
        ("kohya", "lora_unet_x", "magnitude", "linear", "has no magnitude"),
        ("kohya", "lora_unet_x", "bias", "linear", "has no bias"),
        ("kohya", "lora_te_x", "A", "embedding", "has no embedding"),
        ("diffusers", "text_encoder.x", "A", "embedding", "has no embedding"),
        ("diffusers", "unet.x", "alpha", "linear", "has no alpha"),
        ("peft", "x", "alpha", "linear", "has no alpha"),
    ],
)
def test_what_a_format_lacks_is_refused(style, module, part, kind, problem) -> None:
    with pytest.raises(AdapterError, match=problem) as caught:
        lora_key(module, part, kind, style=style)
    assert (caught.value.tensor, bool(caught.value.remedy)) == (module, True)


PATH = "down_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("module", "source", "target", "options", "wanted"),
    [
        (PATH, "peft", "peft", {}, PATH),
        (PATH, "peft", "diffusers", {"component": "unet"}, f"unet.{PATH}"),
        (PATH, "peft", "kohya", {"component": "unet"}, "lora_unet_down_blocks_0_attn1_to_q"),
        (f"unet.{PATH}", "diffusers", "peft", {}, PATH),
        (f"unet.{PATH}", "diffusers", "peft", {"component": "unet"}, PATH),
        (f"unet.{PATH}", "diffusers", "kohya", {}, "lora_unet_down_blocks_0_attn1_to_q"),
        ("text_encoder.a.q", "diffusers", "kohya", {}, "lora_te_a_q"),
        ("text_encoder.a.q", "diffusers", "kohya", {"encoders": 2}, "lora_te1_a_q"),
        ("text_encoder_2.a.q", "diffusers", "kohya", {"encoders": 2}, "lora_te2_a_q"),
        ("transformer.a.q", "diffusers", "kohya", {}, "lora_transformer_a_q"),
        ("lora_te2_a_q", "kohya", "peft", {"base_modules": ["a.q", "a.k"]}, "a.q"),
        (
            "lora_unet_down_blocks_0_attn1_to_q",
            "kohya",
            "diffusers",
            {"base_modules": [PATH, "mid_block"], "component": "unet"},
            f"unet.{PATH}",
        ),
        ("lora_te1_a_q", "kohya", "peft", {"base_modules": ["text_encoder.a.q"]}, "a.q"),
    ],
)
def test_names_convert(module, source, target, options, wanted) -> None:
    assert converted_module(module, source, target, **options) == wanted


@pytest.mark.parametrize(
    ("module", "source", "target", "options", "problem"),
    [
        ("lora_unet_a_q", "kohya", "peft", {}, "have lost their dots"),
        ("lora_unet_a_q", "kohya", "diffusers", {}, "have lost their dots"),
        ("lora_unet_a_q", "kohya", "peft", {"base_modules": ["a.k"]}, "not in the base model"),
        ("lora_unet_a_q", "kohya", "peft", {"base_modules": ["a_q", "a.q"]}, "fits several"),
        ("a.q", "peft", "diffusers", {}, "which part of a pipeline"),
        ("a.q", "diffusers", "kohya", {}, "which part of a pipeline"),
        ("unet.a", "diffusers", "peft", {"component": "text_encoder"}, "another component"),
        ("controlnet.a", "diffusers", "kohya", {}, "no prefix for the component"),
    ],
)
def test_conversions_that_lack_something_are_refused(
    module, source, target, options, problem
) -> None:
    with pytest.raises(AdapterError, match=problem) as caught:
        converted_module(module, source, target, **options)
    assert caught.value.remedy


def test_flattened_names_prefer_whole_paths_and_keep_to_their_component() -> None:
    names = FlattenedNames(["a.q", "x.a.q", "text_encoder.l.q", "text_encoder_2.l.q", "u.m.q"])
    assert names.path("lora_unet_a_q") == "a.q"
    assert names.path("lora_te_l_q") == names.path("lora_te1_l_q") == "text_encoder.l.q"
    assert names.path("lora_te2_l_q") == "text_encoder_2.l.q"
    assert names.path("lycoris_u_m_q") == "u.m.q"
    with pytest.raises(AdapterError, match="not in the base model"):
        names.path("lora_unet_l_q")  # there, but in the text encoders
    with pytest.raises(AdapterError, match="not in the base model"):
        names.path("lora_unet_m")
