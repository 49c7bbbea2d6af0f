"""Every recipe of a merge is valid, plans, and runs small; so does every `init` template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from orthomerge.merging.plan import Plan
from orthomerge.merging.registry import all_methods
from orthomerge.merging.run import run_plan
from orthomerge.recipe.loader import load_recipe
from orthomerge.recipe.run import plan_recipe
from orthomerge.recipe.template import recipe_template

ROOT = Path(__file__).parent.parent.parent
EVERY = sorted((ROOT / "recipes").rglob("*.yaml"))
# test_unlearning_recipes has the others.
SHIPPED = [path for path in EVERY if path.parent.name != "unlearning"]
MODULES = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def write_source(folder: Path, seed: int) -> None:
    """Write what the path's name says: a model, an OFT adapter or a LoRA adapter."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    if "adapter" in folder.as_posix():
        packed = {
            f"base_model.model.{module}.oft_R.weight": 0.1 * torch.randn(2, 6, generator=generator)
            for module in MODULES
        }
        save_file(packed, folder / "adapter_model.safetensors")
        config = '{"peft_type": "OFT", "oft_block_size": 4, "r": 0, "peft_version": "0.19.0"}'
        (folder / "adapter_config.json").write_text(config)
    elif "lora" in folder.as_posix():
        factors = {
            f"base_model.model.{module}.lora_{side}.weight": 0.1
            * torch.randn(shape, generator=generator)
            for module in MODULES
            for side, shape in (("A", (2, 8)), ("B", (8, 2)))
        }
        save_file(factors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'
        )
    else:
        names = [f"{module}.weight" for module in MODULES]
        names += ["model.embed_tokens.weight", "lm_head.weight"]
        tensors = {name: torch.randn(8, 8, generator=generator) for name in names}
        save_file(tensors, folder / "model.safetensors")


def plan_in(folder: Path, recipe: Path, monkeypatch) -> Plan:
    data = yaml.safe_load(recipe.read_text())
    entries = [e if isinstance(e, str) else e["path"] for e in data["models"]]
    monkeypatch.chdir(folder)
    for seed, name in enumerate(dict.fromkeys([*entries, *filter(None, [data.get("base")])])):
        write_source(folder / name, seed)
    return plan_recipe(load_recipe(recipe))


def test_there_are_recipes() -> None:
    assert len(SHIPPED) >= 5


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_plans_and_runs(recipe, tmp_path, monkeypatch) -> None:
    result = run_plan(plan_in(tmp_path, recipe, monkeypatch))
    assert result.output is not None
    assert (tmp_path / result.output).exists()


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_says_how_to_run_it(recipe) -> None:
    head = recipe.read_text()
    assert f"orthomerge merge --recipe recipes/{recipe.name}" in head


@pytest.mark.parametrize("method", all_methods())
def test_template_of_every_method_plans_and_runs(method, tmp_path, monkeypatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_template(all_methods()[method], recipe))
    prepared = plan_in(tmp_path, recipe, monkeypatch)
    assert prepared.method.name == method
    assert prepared.request.parameters == {
        name: parameter.default for name, parameter in all_methods()[method].parameters.items()
    }
    assert run_plan(prepared).output is not None
