"""Forgetting by negation: what an expert learned is taken away, against float64 oracles."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from unlearn_runs import leftovers

from orthomerge.quiet import quiet_libraries


def base_tensors(facts):
    return load_file(facts / "model" / "model.safetensors")


def expert_adapter(facts, folder, kind):
    """Write an adapter with random weights; return PEFT's merged model in float64."""
    from peft import LoraConfig, OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    targets = ["q_proj", "up_proj"]
    config = (
        LoraConfig(r=4, lora_alpha=6, target_modules=targets)
        if kind == "lora"
        else OFTConfig(oft_block_size=8, target_modules=targets, use_cayley_neumann=False)
    )
    with quiet_libraries():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(facts / "model"), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "oft_R" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)
        merged = model.double().merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def negated(run, facts, tmp_path, expert, strength):
    recipe = tmp_path / "negation.yaml"
    recipe.write_text(
        f"model: {facts}/model\noutput: {tmp_path}/out\n"
        f"negation: {{expert: {expert}, strength: {strength}}}\n"
    )
    code, out, err = run("unlearn", recipe, "--json")
    assert code == 0, err + out
    assert json.loads(out)["output"].endswith("out")
    return load_file(tmp_path / "out" / "model.safetensors")


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_full_expert_is_subtracted_as_a_task_vector(strength, run, facts, tmp_path):
    base = base_tensors(facts)
    generator = torch.Generator().manual_seed(2)
    expert = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    (tmp_path / "expert").mkdir()
    save_file(expert, tmp_path / "expert" / "model.safetensors", {"format": "pt"})
    (tmp_path / "expert" / "config.json").write_text((facts / "model" / "config.json").read_text())
    found = negated(run, facts, tmp_path, tmp_path / "expert", strength)
    assert set(found) == set(base)
    for name, tensor in base.items():
        close(found[name], tensor.double() - strength * (expert[name].double() - tensor.double()))


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_a_lora_expert_is_subtracted(strength, run, facts, tmp_path):
    base = base_tensors(facts)
    merged = expert_adapter(facts, tmp_path / "expert", "lora")
    found = negated(run, facts, tmp_path, tmp_path / "expert", strength)
    changed = 0
    for name, tensor in base.items():
        delta = merged[name].double() - tensor.double()
        close(found[name], tensor.double() - strength * delta)
        changed += bool(delta.abs().max() > 1e-3)
    assert changed == 4


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_oft_expert_is_turned_back(strength, run, facts, tmp_path):
    base = base_tensors(facts)
    merged = expert_adapter(facts, tmp_path / "expert", "oft")
    found = negated(run, facts, tmp_path, tmp_path / "expert", strength)
    changed = 0
    for name, tensor in base.items():
        W, E = tensor.double(), merged[name].double()
        if (E - W).abs().max() < 1e-3:
            assert found[name].equal(tensor)
            continue
        R = torch.linalg.lstsq(W, E).solution  # these matrices have full column rank
        eye = torch.eye(len(R), dtype=torch.float64)
        torch.testing.assert_close(R @ R.T, eye, rtol=0, atol=1e-5)
        if strength == 1.0:
            back = R.T
        else:  # the Cayley generator A of R = (I - A)^-1 (I + A), scaled by -s
            A = strength * torch.linalg.solve(R + eye, R - eye)
            back = torch.linalg.solve(eye + A, eye - A)
        close(found[name], W @ back)
        changed += 1
    assert changed == 4


def test_what_an_expert_is_not_is_refused(run, facts, tmp_path):
    recipe = tmp_path / "negation.yaml"
    recipe.write_text(
        f"model: {facts}/model\noutput: {tmp_path}/out\nnegation: {{expert: {tmp_path}/none}}\n"
    )
    code, _, err = run("unlearn", recipe)
    assert code == 3
    assert "none" in err
    recipe.write_text(f"model: {facts}/model\noutput: {tmp_path}/out\nnegation: {{strength: 0}}\n")
    code, _, err = run("unlearn", recipe)
    assert code == 4
    assert "negation.strength" in err
    assert "negation.expert" in err
    assert leftovers(tmp_path) == {"negation.yaml"}


def test_the_door_in_python_says_where_negation_is_done(facts, tmp_path):
    from orthomerge.errors import RecipeError
    from orthomerge.recipe.unlearning import unlearn

    with pytest.raises(RecipeError, match="negation is a merge"):
        unlearn(facts / "model", output=tmp_path / "out", negation={"expert": "somewhere"})


def test_a_dry_run_of_negation_plans_the_merge(run, facts, tmp_path):
    expert_adapter(facts, tmp_path / "expert", "lora")
    recipe = tmp_path / "negation.yaml"
    recipe.write_text(
        f"model: {facts}/model\noutput: {tmp_path}/out\nnegation: {{expert: {tmp_path}/expert}}\n"
    )
    code, out, err = run("unlearn", recipe, "--dry-run")
    assert code == 0, err
    assert "task-arithmetic" in out + err
    assert not (tmp_path / "out").exists()
