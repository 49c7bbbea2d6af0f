"""LoRA files without a config, in kohya's and diffusers' formats: what is read, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orthomerge.adapters.lora_styles import file_style, split_lora_key
from orthomerge.adapters.negation import negated
from orthomerge.adapters.sources import Source, open_source
from orthomerge.adapters.updates import adapter_updates
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.errors import AdapterError, OrthoMergeError, ProblemsError

UNET_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PATH_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    name: str = "lora.safetensors",
) -> Source:
    folder.mkdir(exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / name, metadata)
    return open_source(folder / name)


def kohya(
    module: str = UNET_Q, rank: int = 2, alpha: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    tensors = {
        f"{module}.lora_down.weight": normal(rank, 4),
        f"{module}.lora_up.weight": normal(3, rank, seed=1),
    }
    return tensors if alpha is None else {**tensors, f"{module}.alpha": alpha}


def diffusers(
    module: str = f"unet.{PATH_Q}", a: str = ".lora_A.weight", b: str = ".lora_B.weight"
) -> dict[str, torch.Tensor]:
    return {f"{module}{a}": normal(2, 4), f"{module}{b}": normal(3, 2, seed=1)}


def product(source: Source, module: str) -> torch.Tensor:
    assert source.lora is not None
    B, A = source.lora.factors(module, torch.float64)
    return B @ A


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (torch.tensor(1.0), 0.5),
        (torch.tensor(3), 1.5),
        (torch.tensor([1.0]).bfloat16(), 0.5),
        (torch.tensor(-1.0).half(), -0.5),
    ],
    ids=str,
)
def test_kohyas_alpha_is_the_scale(
    tmp_path: Path, alpha: torch.Tensor | None, scale: float
) -> None:
    """The alpha tensor over the rank; 1 without it. extract_lora writes alphas as integers."""
    tensors = kohya(alpha=alpha)
    source = write(tmp_path, tensors)
    assert (source.kind, source.description) == ("LORA", "LoRA adapter (rank 2, kohya)")
    assert source.lora is not None
    module = source.lora.modules[UNET_Q]
    assert (module.scale, module.alpha, module.rank) == (scale, 2 * scale, 2)
    assert module.alpha_key == (None if alpha is None else f"{UNET_Q}.alpha")
    down, up = (tensors[f"{UNET_Q}.lora_{side}.weight"].double() for side in ("down", "up"))
    torch.testing.assert_close(product(source, UNET_Q), scale * up @ down, atol=0, rtol=0)


def test_every_text_encoder_and_convolutions_of_kohya(tmp_path: Path) -> None:
    names = [f"lora_{part}_text_model_encoder_layers_0_mlp_fc1" for part in ("te", "te1", "te2")]
    tensors = {k: v for name in names for k, v in kohya(name).items()}
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors[f"{conv}.lora_down.weight"] = normal(2, 4, 3, 3)
    tensors[f"{conv}.lora_up.weight"] = normal(5, 2, 1, 1)
    tensors[f"{conv}.alpha"] = torch.tensor(1.0)
    source = write(tmp_path, tensors, {"ss_network_dim": "128", "ss_network_alpha": "64"})
    assert source.lora is not None
    assert set(source.lora.modules) == {*names, conv}
    module = source.lora.modules[conv]
    assert (module.kind, module.rows, module.shape, module.scale) == ("conv", 5, (4, 3, 3), 0.5)
    assert product(source, conv).shape == (5, 36)
    assert source.checkpoint.metadata["ss_network_dim"] == "128"  # kept, and not believed
    assert source.lora.style == "kohya"
    assert source.lora.others == {}


@pytest.mark.parametrize(
    ("module", "a", "b", "read"),
    [
        (f"unet.{PATH_Q}", ".lora_A.weight", ".lora_B.weight", f"unet.{PATH_Q}"),
        (f"unet.{PATH_Q}", ".lora.down.weight", ".lora.up.weight", f"unet.{PATH_Q}"),
        (PATH_Q, ".lora_A.weight", ".lora_B.weight", f"unet.{PATH_Q}"),
        (
            PATH_Q.replace("to_q", "processor.to_q"),
            "_lora.down.weight",
            "_lora.up.weight",
            f"unet.{PATH_Q}",
        ),
        (
            "unet.mid_block.attn1.processor.to_out",
            "_lora.down.weight",
            "_lora.up.weight",
            "unet.mid_block.attn1.to_out.0",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out",
            "_lora.down.weight",
            "_lora.up.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        ),
        (
            "transformer.single_transformer_blocks.0.proj_mlp",
            ".lora_A.weight",
            ".lora_B.weight",
            "transformer.single_transformer_blocks.0.proj_mlp",
        ),
        (
            "diffusion_model.blocks.0.cross_attn.k",
            ".lora_down.weight",
            ".lora_up.weight",
            "diffusion_model.blocks.0.cross_attn.k",
        ),
    ],
)
@pytest.mark.parametrize("alpha", [None, 4.0])
def test_spellings_of_diffusers(
    tmp_path: Path, module: str, a: str, b: str, read: str, alpha: float | None
) -> None:
    tensors = diffusers(module, a, b)
    down, up = (value.double() for value in tensors.values())
    if alpha is not None:
        tensors[f"{module}{'_lora' if a.startswith('_') else ''}.alpha"] = torch.tensor(alpha)
    source = write(tmp_path, tensors)
    assert source.description == "LoRA adapter (rank 2, diffusers)"
    assert source.lora is not None
    assert set(source.lora.modules) == {read}
    scale = 1.0 if alpha is None else 2.0
    torch.testing.assert_close(product(source, read), scale * up @ down, atol=0, rtol=0)


def test_diffusers_metadata_says_the_scale(tmp_path: Path) -> None:
    """PEFT's config per component; ``save_lora_adapter`` writes one without component."""
    tensors = {**diffusers(), **diffusers("text_encoder.layers.0.q_proj")}
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 8,
        "unet.use_rslora": True,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 1,
        "text_encoder.alpha_pattern": {"q_proj": 6},
    }
    source = write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert source.lora is not None
    scales = {name: module.scale for name, module in source.lora.modules.items()}
    assert scales == {
        f"unet.{PATH_Q}": pytest.approx(8 / math.sqrt(2)),
        "text_encoder.layers.0.q_proj": 3.0,
    }
    alone = {**diffusers(PATH_Q), **diffusers("some_head.proj")}
    flat = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 5})}
    source = write(tmp_path, alone, flat)
    assert source.lora is not None
    scales = {name: module.scale for name, module in source.lora.modules.items()}
    assert scales == {f"unet.{PATH_Q}": 2.5, "some_head.proj": 2.5}


def test_magnitudes_and_biases_of_diffusers_are_pefts(tmp_path: Path) -> None:
    name = f"unet.{PATH_Q}"
    more = {f"{name}.lora_magnitude_vector": torch.ones(3), f"{name}.lora_B.bias": torch.ones(3)}
    source = write(tmp_path, {**diffusers(), **more})
    assert source.lora is not None
    module = source.lora.modules[name]
    assert source.lora.dora
    assert module.magnitude_key == f"{name}.lora_magnitude_vector"
    assert module.bias_key == f"{name}.lora_B.bias"
    base = {f"{PATH_Q}.weight": normal(3, 4, seed=3), f"{PATH_Q}.bias": torch.zeros(3)}
    found = adapter_updates(source, open_checkpoint(base).tensors).updates
    W0 = base[f"{PATH_Q}.weight"]
    W = W0 + found[f"{PATH_Q}.weight"].delta(W0, (3, 4), torch.float32)
    torch.testing.assert_close(W.norm(dim=1), torch.ones(3))
    assert float(found[f"{PATH_Q}.bias"].delta(None, (3,), torch.float32).sum()) == 3


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_a_base_is_found_by_its_own_names(tmp_path: Path, style: str) -> None:
    tensors = kohya(alpha=torch.tensor(1.0)) if style == "kohya" else diffusers()
    source = write(tmp_path, tensors)
    W0 = normal(3, 4, seed=5)
    for prefix in ("", "unet."):
        base = {f"{prefix}{PATH_Q}.weight": W0, f"{prefix}mid_block.to_q.weight": W0}
        found = adapter_updates(source, open_checkpoint(base).tensors).updates
        assert list(found) == [f"{prefix}{PATH_Q}.weight"]
        (update,) = found.values()
        assert source.lora is not None
        wanted = product(source, next(iter(source.lora.modules)))
        torch.testing.assert_close(update.delta(None, (3, 4), torch.float64), wanted)


def test_a_kernel_of_one_is_a_linear_layer(tmp_path: Path) -> None:
    source = write(tmp_path, kohya())
    base = {f"{PATH_Q}.weight": torch.zeros(3, 4, 1, 1)}
    (update,) = adapter_updates(source, open_checkpoint(base).tensors).updates.values()
    delta = update.delta(None, (3, 4, 1, 1), torch.float64)
    torch.testing.assert_close(delta[..., 0, 0], product(source, UNET_Q))
    wide = {f"{PATH_Q}.weight": torch.zeros(3, 4, 3, 3)}
    with pytest.raises(AdapterError, match="do not fit"):
        adapter_updates(source, open_checkpoint(wide).tensors)


def test_ambiguous_flattened_names_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, kohya("lora_unet_a_b_c"))
    two = {"a.b_c.weight": normal(3, 4), "a_b.c.weight": normal(3, 4)}
    with pytest.raises(AdapterError, match=r"fits several.*a\.b_c, a_b\.c") as caught:
        adapter_updates(source, open_checkpoint(two).tensors)
    assert caught.value.tensor == "lora_unet_a_b_c"
    assert caught.value.file == source.origin
    with pytest.raises(AdapterError, match=r"none of the 1 modules.*dots for underscores"):
        adapter_updates(source, open_checkpoint({"x.weight": normal(3, 4)}).tensors)


def test_a_state_dict_and_a_folder_are_recognised_too(tmp_path: Path) -> None:
    assert open_source(kohya()).description == "LoRA adapter (rank 2, kohya)"
    write(tmp_path, diffusers(), name="pytorch_lora_weights.safetensors")
    assert open_source(tmp_path).description == "LoRA adapter (rank 2, diffusers)"


def test_pefts_own_names_still_need_their_config(tmp_path: Path) -> None:
    for module in ("base_model.model.q", "model.layers.0.self_attn.q_proj", "q"):
        with pytest.raises(AdapterError, match=r"no adapter_config\.json beside them"):
            write(tmp_path, diffusers(module))


BAD_META = {"lora_adapter_metadata": "[1"}
META = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4})}


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem", "tensor"),
    [
        (kohya() | {f"{UNET_Q}.lora_mid.weight": normal(2, 2, 3, 3)}, None, "lora_mid", "mid"),
        ({f"{UNET_Q}.hada_w1_a": normal(3, 2)}, None, r"LoHa \(hada_\)", "hada_w1_a"),
        ({f"{UNET_Q}.lokr_w1": normal(3, 2)}, None, r"LoKr \(lokr_\)", "lokr_w1"),
        (kohya() | {f"{UNET_Q}.dora_scale": normal(3, 1)}, None, "DoRA in LyCORIS", "dora_scale"),
        (kohya() | {f"{UNET_Q}.diff_b": normal(3)}, None, "a dense difference", "diff_b"),
        (kohya() | {"x.weight": normal(3)}, None, "is no tensor of a LoRA.*kohya", "x.weight"),
        (diffusers() | {"unet.x.weight": normal(3)}, None, "is no tensor.*diffusers", "unet.x"),
        (kohya() | diffusers(), None, "mixes names of several LoRA formats", "lora"),
        (diffusers() | diffusers("base_model.model.q"), None, "mixes names", "lora_"),
        (kohya() | {"q.lora_A.weight": normal(2, 4)}, None, "mixes names", "lora_"),
        ({f"{UNET_Q}.lora_down.weight": normal(2, 4)}, None, "one factor .* missing", UNET_Q),
        ({f"{UNET_Q}.lora_up.weight": normal(3, 2)}, None, "one factor .* missing", UNET_Q),
        (kohya() | {"lora_te_x.alpha": torch.tensor(1.0)}, None, "alpha without factors", "te_x"),
        (kohya(alpha=torch.ones(2)), None, "an alpha is not one number", "alpha"),
        (kohya(alpha=torch.tensor(True)), None, "an alpha is not one number", "alpha"),
        (kohya(alpha=torch.tensor(math.nan)), None, "an alpha is not finite", "alpha"),
        (kohya(alpha=torch.tensor(math.inf)), None, "an alpha is not finite", "alpha"),
        (kohya(alpha=torch.tensor(0.0)), None, "an alpha is 0", "alpha"),
        (kohya() | {f"{UNET_Q}.lora_up.weight": normal(3, 5)}, None, "ranks differ", "down"),
        (kohya() | {f"{UNET_Q}.lora_up.weight": normal(3)}, None, "not the two factors", "down"),
        (kohya() | {f"{UNET_Q}.lora_up.weight": torch.ones(3, 2).int()}, None, "dtype", "up"),
        (
            diffusers() | {f"unet.{PATH_Q}.lora.down.weight": normal(2, 4)},
            None,
            "two tensors are the same part",
            "lora",
        ),
        (
            diffusers() | {f"unet.{PATH_Q}.lora_magnitude_vector": torch.ones(2)},
            None,
            "not one magnitude per feature",
            "magnitude",
        ),
        (
            diffusers() | diffusers("unet.x") | {"unet.x.alpha": torch.tensor(1.0)},
            None,
            "some modules have an alpha and others do not",
            "unet.x.alpha",
        ),
        (
            diffusers() | {f"unet.{PATH_Q}.alpha": torch.tensor(1.0)},
            META,
            "both alpha tensors and a config",
            "alpha",
        ),
        (diffusers(), BAD_META, "is no JSON object", ""),
        (
            diffusers(),
            {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": "pissa"})},
            "'pissa' changed the base's weights",
            "",
        ),
        (
            diffusers(),
            {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "8"})},
            "lora_alpha has the wrong type",
            "",
        ),
    ],
)
def test_each_fault_gives_one_clear_error(
    tmp_path: Path,
    tensors: dict[str, Any],
    metadata: dict[str, str] | None,
    problem: str,
    tensor: str,
) -> None:
    with pytest.raises(OrthoMergeError, match=problem) as caught:
        write(tmp_path, tensors, metadata)
    assert not isinstance(caught.value, ProblemsError)
    assert caught.value.file == str(tmp_path / "lora.safetensors")
    assert tensor in (caught.value.tensor or "")
    assert caught.value.remedy


def test_all_kinds_of_problems_come_at_once(tmp_path: Path) -> None:
    tensors = kohya(alpha=torch.tensor(0.0)) | {"lora_te_x.lora_up.weight": normal(3, 2)}
    with pytest.raises(ProblemsError) as caught:
        write(tmp_path, tensors)
    assert [error.tensor for error in caught.value.problems] == [
        f"{UNET_Q}.alpha",
        "lora_te_x.lora_up.weight",
    ]


def test_kohyas_names_beside_a_foreign_config_are_kohyas(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert write(tmp_path, kohya()).description.endswith("kohya)")
    with pytest.raises(AdapterError, match="does not start with"):  # PEFT's file, edited
        write(tmp_path, kohya(), name="adapter_model.safetensors")


def test_negation_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="this is in kohya's") as caught:
        negated(write(tmp_path, kohya()))
    assert caught.value.remedy


def test_models_are_not_taken_for_adapters() -> None:
    for names in (
        ["unet.mid_block.to_q.weight", "lora_scale.weight"],
        ["noise.alpha", "lora_alpha.alpha"],
        ["model.layers.0.weight"],
        [],
    ):
        assert file_style(names) is None
    assert split_lora_key("model.layers.0.weight") is None
