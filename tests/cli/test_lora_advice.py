"""What users of LoRA adapters get wrong, or want next: what the command line tells them to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora_refusals import PREFIX, write


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two adapters, one with a bias of B and one with a head, and their base without biases."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    write(tmp_path / "b", rank=3)
    save_file({"layer.q.weight": torch.ones(6, 4)}, "base.safetensors")
    return tmp_path


def add(folder, tensors, **config) -> None:
    """Add tensors and settings to an adapter."""
    file, described = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content = {**load_file(file), **{PREFIX + key: value for key, value in tensors.items()}}
    save_file(content, file)
    described.write_text(json.dumps(json.loads(described.read_text()) | config))


def assert_says(run, code, arguments, *words) -> str:
    """Check the exit code and the words of the message, and that nothing was written."""
    found, _, err = run(*arguments)
    text = " ".join(err.split())
    assert found == code, err
    for word in words:
        assert word in text, err
    return text


def test_a_folder_of_several_adapters_names_them(here, run) -> None:
    """PEFT writes one folder per adapter name, so this is what a user has at hand."""
    for name in ("alice", "bob"):
        shutil.copytree(here / "a", here / "both" / name)
    words = "folders of adapters: alice, bob", "Name one of them, e.g. both/alice"
    assert_says(run, 3, ("merge", "a", "both", "-o", "out"), *words)
    assert_says(run, 3, ("inspect", "both"), *words)


def test_dora_without_a_base_names_the_adapters_that_have_it(here, run) -> None:
    write(here / "b", magnitude=True)
    assert_says(run, 3, ("merge", "a", "b", "-o", "out"), "error: b: 'layer.q': DoRA", "--base")


def test_a_bias_of_a_layer_without_one_is_explained_once(here, run) -> None:
    add(here / "a", {"layer.q.lora_B.bias": torch.ones(6)}, lora_bias=True)
    command = ("merge", "a", "b", "--base", "base.safetensors", "-o", "out")
    text = assert_says(run, 3, command, "a: 'layer.q.bias'", "none in the base", "without --base")
    assert "trained on" not in text


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_heads_in_a_format_without_them_are_refused_by_the_plan(here, run, style, command) -> None:
    add(here / "b", {"head.weight": torch.ones(2, 2)}, modules_to_save=["head"])
    options = ("--style", style, "--set", "output.component=unet", "-o", "out.safetensors")
    words = "error: b: 'head.weight'", f"{style}'s format holds no whole tensors", "leave --style"
    text = assert_says(run, 3, (command, "a", "b", *options), *words)
    assert "partial" not in text


def test_the_remedies_for_styles_work(here, run) -> None:
    """The component as the message spells it; then the minus of a file of kohya's."""
    style = ("merge", "a", "--style", "kohya", "-o", "k.safetensors", "-q")
    assert_says(run, 3, style, "--set output.component=unet")
    assert_says(run, 0, (*style, "--set", "output.component=unet"))
    advice = "merge k.safetensors --method passthrough --set scale=-1 -o OUT.safetensors"
    assert_says(run, 3, ("negate", "k.safetensors", "-o", "n"), "kohya", advice)
    assert_says(run, 0, (*advice.split(), "-q"))
    one, other = load_file("k.safetensors"), load_file("OUT.safetensors")
    module = "lora_unet_layer_q.lora_"
    first = one[f"{module}up.weight"] @ one[f"{module}down.weight"]
    second = other[f"{module}up.weight"] @ other[f"{module}down.weight"]
    torch.testing.assert_close(first, -second)
    back = ("merge", "k.safetensors", "--style", "peft", "-m", "passthrough", "-o", "p")
    assert_says(run, 3, back, "--as lora", "--base")
    base = ("--as", "lora", "--base", "base.safetensors")
    assert "does not use the base" not in assert_says(run, 0, (*back, *base))


def test_a_low_share_of_energy_names_the_module(here, run) -> None:
    command = ("merge", "a", "b", "--rank", "1", "-m", "sum", "-w", "1", "-w", "1", "-o", "out")
    code, out, err = run(*command)
    assert code == 0
    assert "least in layer.q. Raise --rank" in out + err


def test_prompts_cannot_be_merged_at_all(here, run) -> None:
    (here / "p").mkdir()
    save_file({"prompt_embeddings": torch.ones(2, 4)}, here / "p" / "adapter_model.safetensors")
    (here / "p" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    text = assert_says(
        run, 4, ("merge", "a", "p", "-o", "out"), "changes no weights", "an adapter beside"
    )
    assert "into its base with PEFT" not in text
