"""OFT adapters through the whole engine: adapter out, full checkpoint out, mixed conventions."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthomerge import merge, plan
from orthomerge.errors import OrthoMergeError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Llama and adapters that PEFT trained on it for a few steps."""
    folder = tmp_path_factory.mktemp("oft")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    for seed in (1, 2):
        for neumann in (True, False):
            train(folder, f"{'neumann' if neumann else 'exact'}{seed}", seed, neumann)
    train(folder, "small", 3, True, oft_block_size=8)
    train(folder, "shared", 4, True, block_share=True)
    train(folder, "headed", 5, True, modules_to_save=["lm_head"])
    return folder


def load_base(home):
    return transformers.LlamaForCausalLM.from_pretrained(home / "base")


def train(home, name, seed, neumann, **options):
    settings = {"oft_block_size": 16, "target_modules": TARGETS, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            load_base(home), peft.OFTConfig(use_cayley_neumann=neumann, **settings)
        )
    torch.manual_seed(seed)
    ids = torch.randint(0, 50, (4, 12))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(home / name)


def flipped(home, name, target):
    """The same rotations under the other convention: negated numbers, other flag."""
    shutil.copytree(home / name, target)
    tensors = load_file(target / "adapter_model.safetensors")
    save_file({k: -v for k, v in tensors.items()}, target / "adapter_model.safetensors")
    config = json.loads((target / "adapter_config.json").read_text())
    config["use_cayley_neumann"] = not config["use_cayley_neumann"]
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def peft_weights(home, adapter):
    """Dense weights as PEFT computes them."""
    model = peft.PeftModel.from_pretrained(load_base(home), adapter).merge_and_unload()
    return {name: value.detach() for name, value in model.state_dict().items()}


def assert_equal_weights(found, wanted, tolerance=2e-6):
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("convention", ["neumann", "exact"])
def test_merged_adapter_in_peft_equals_our_full_checkpoint(home, tmp_path, convention) -> None:
    adapters = [home / f"{convention}1", home / f"{convention}2"]
    merge(adapters, output=tmp_path / "adapter")
    full = merge(adapters, base=home / "base").tensors
    assert_equal_weights(full, peft_weights(home, tmp_path / "adapter"))


def test_full_checkpoint_loads_in_transformers(home, tmp_path) -> None:
    result = merge([home / "exact1", home / "exact2"], base=home / "base", output=tmp_path / "full")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "full")
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()
    assert result.plan.method.name == "orthomerge"
    changed = load_file(home / "base" / "model.safetensors")
    merged = load_file(tmp_path / "full" / "model.safetensors")
    different = {name for name in changed if not torch.equal(changed[name], merged[name])}
    assert different == {n for n in changed if any(t in n for t in TARGETS)}


@pytest.mark.parametrize("name", ["neumann1", "exact1", "shared", "headed", "small"])
def test_one_adapter_alone_is_itself(home, name) -> None:
    full = merge([home / name], base=home / "base").tensors
    assert_equal_weights(full, peft_weights(home, home / name))


def test_order_does_not_matter_and_weights_do(home) -> None:
    adapters = [home / "exact1", home / "exact2"]
    one = merge(adapters, weights=[0.7, 0.3]).tensors
    other = merge(adapters[::-1], weights=[0.3, 0.7]).tensors
    assert_equal_weights(one, other, 1e-7)
    equal = merge(adapters).tensors
    assert any(not torch.allclose(one[name], equal[name]) for name in one)


def test_equal_experts_merge_to_themselves(home) -> None:
    merged = merge([home / "exact1"] * 3).tensors
    assert_equal_weights(merged, load_file(home / "exact1" / "adapter_model.safetensors"), 1e-7)


def test_conventions_merge_to_the_same_rotation(home, tmp_path) -> None:
    """Trained under one convention, rewritten under the other: the merge is the same rotation."""
    for convention in ("neumann", "exact"):
        first, second = home / f"{convention}1", home / f"{convention}2"
        other = flipped(home, f"{convention}2", tmp_path / convention)
        settings = {"base": home / "base", "output_settings": {"back_map": "exact"}}
        wanted = merge([first, second], **settings)
        found = merge([first, other], **settings)
        assert_equal_weights(found.tensors, wanted.tensors, 1e-7)
        residuals = [r["orthogonality_residual"] for r in found.rotations.values()]
        assert max(residuals) < 1e-12


def test_mixed_conventions_fall_back_to_the_exact_map_and_say_so(home, tmp_path) -> None:
    adapters = [home / "neumann1", home / "exact2"]
    result = merge(adapters, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_cayley_neumann"] is False
    assert any("conventions differ" in note for note in result.plan.notes)
    full = merge(adapters, base=home / "base").tensors
    assert_equal_weights(full, peft_weights(home, tmp_path / "out"))
    with pytest.raises(OrthoMergeError, match="as_trained"):
        plan(adapters, output_settings={"back_map": "as_trained"})


def test_block_sizes_meet_at_their_common_multiple(home, tmp_path) -> None:
    adapters = [home / "neumann1", home / "small"]
    merge(adapters, output=tmp_path / "out")
    full = merge(adapters, base=home / "base").tensors
    assert_equal_weights(full, peft_weights(home, tmp_path / "out"))


def test_shared_and_unshared_blocks_merge(home, tmp_path) -> None:
    adapters = [home / "neumann1", home / "shared"]
    merge(adapters, output=tmp_path / "out")
    full = merge(adapters, base=home / "base").tensors
    assert_equal_weights(full, peft_weights(home, tmp_path / "out"))


def test_saved_head_is_carried_over_and_averaged(home, tmp_path) -> None:
    adapters = [home / "headed", home / "neumann1"]
    merge(adapters, output=tmp_path / "out")
    full = merge(adapters, base=home / "base").tensors
    assert_equal_weights(full, peft_weights(home, tmp_path / "out"))
    head = load_file(home / "headed" / "adapter_model.safetensors")
    wanted = head["base_model.model.lm_head.weight"]
    torch.testing.assert_close(full["lm_head.weight"], wanted)


def test_magnitude_is_the_mean_of_the_experts(home) -> None:
    result = merge([home / "exact1", home / "exact2"])
    for measured in result.rotations.values():
        assert measured["merged_norm"] == pytest.approx(measured["mean_norm"], rel=1e-12)
    plain = merge([home / "exact1", home / "exact2"], correction="none")
    assert all(m["merged_norm"] < 0.9 * m["mean_norm"] for m in plain.rotations.values())


def test_module_missing_in_one_adapter_takes_part_as_the_identity(home, tmp_path) -> None:
    shutil.copytree(home / "exact2", tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if "down_proj" not in name}
    save_file(kept, tmp_path / "part" / "adapter_model.safetensors")
    result = merge([home / "exact1", tmp_path / "part"], correction="none")
    assert any("identity" in note for note in result.plan.notes)
    alone = load_file(home / "exact1" / "adapter_model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    torch.testing.assert_close(result.tensors[name], alone[name] / 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "linear"}, "merges full checkpoints"),
        ({"weights": [1.0, -0.5]}, "must not be negative"),
        ({"weights": [0.0, 0.0]}, "sum to zero"),
        ({"c_max": 0.5}, "c_max"),
        ({"correction": "column"}, "layer | block | none"),
    ],
)
def test_wrong_settings_are_named(home, settings, words) -> None:
    with pytest.raises(OrthoMergeError) as caught:
        plan([home / "exact1", home / "exact2"], **settings)
    assert words in str(caught.value)


def test_wrong_base_is_refused_in_the_plan(home, tmp_path) -> None:
    with pytest.raises(OrthoMergeError, match="is in the base model"):
        plan([home / "exact1"], base={"something.weight": torch.zeros(2, 2)})
    tensors = load_file(home / "base" / "model.safetensors")
    short = {name: value[..., :-1].contiguous() for name, value in tensors.items()}
    with pytest.raises(OrthoMergeError, match="does not fit this weight"):
        plan([home / "exact1"], base=short)


def test_adapter_without_its_config_is_refused(home, tmp_path) -> None:
    shutil.copy(home / "exact1" / "adapter_model.safetensors", tmp_path / "lonely.safetensors")
    with pytest.raises(OrthoMergeError, match=r"adapter_config\.json"):
        plan([tmp_path / "lonely.safetensors"])


def test_lora_needs_its_base_where_weights_are_merged(home, tmp_path) -> None:
    model = peft.get_peft_model(load_base(home), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(OrthoMergeError, match="Pass --base"):
        plan([tmp_path / "lora"], method="slerp")
