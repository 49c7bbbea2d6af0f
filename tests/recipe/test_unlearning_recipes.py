"""Every recipe in recipes/unlearning is valid, dry-runs and runs small; so does every template."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from orthomerge_cli.main import app
from orthomerge_cli.session import run_guarded
from test_shipped_recipes import write_source
from unlearning_place import SMALL, write_unlearning_place

from orthomerge.errors import OrthoMergeError, ProblemsError
from orthomerge.recipe.kinds import is_unlearning, load_any_recipe
from orthomerge.recipe.unlearning import load_unlearning, unlearning_request
from orthomerge.recipe.unlearning_template import unlearning_template
from orthomerge.unlearning.objectives import all_objectives

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes" / "unlearning").glob("*.yaml"))
NEGATIONS = ("inverse-rotation", "negated-task-vector")
TRAINED = [path for path in SHIPPED if path.stem not in NEGATIONS]
by_name = {"ids": lambda value: getattr(value, "stem", value)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder that the recipes speak of."""
    folder = write_unlearning_place(tmp_path_factory.mktemp("place"))
    for seed, name in enumerate(["models/base", "models/first", "adapters/first"]):
        write_source(folder / name, seed)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


@pytest.fixture
def run(place, monkeypatch, capfd):
    """Run a command line in that folder; return its output."""
    monkeypatch.chdir(place)

    def run(line, *more):
        program, *arguments = shlex.split(line, comments=True)
        assert program == "orthomerge"
        code = run_guarded(app, [*arguments, *more])
        out, err = capfd.readouterr()
        assert code == 0, f"{line}\n{err}"
        return out

    return run


def header(path: Path) -> dict[str, str]:
    """Return the commands of a recipe's header by their label."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("# ")]
    labels = ("Check", "Run", "Change")
    parts = [line[2:].partition(":") for line in lines]
    return {label: command.strip() for label, _, command in parts if label in labels}


def small() -> list[str]:
    return [word for setting in SMALL for word in ("--set", setting)]


def test_there_are_two_recipes_for_every_objective_and_the_special_ones() -> None:
    expected = {f"{name}{end}" for name in all_objectives() for end in ("", "-gu")}
    assert {path.stem for path in SHIPPED} == expected | {*NEGATIONS, "cheap-gu"}


@pytest.mark.parametrize("objective", all_objectives())
def test_the_two_recipes_of_an_objective_differ_in_the_projection_alone(objective) -> None:
    without, with_gu = (
        load_unlearning(ROOT / f"recipes/unlearning/{objective}{end}.yaml") for end in ("", "-gu")
    )
    assert without.objective == with_gu.objective == objective
    assert unlearning_request(without).projection is None
    assert unlearning_request(with_gu).projection is not None
    changes = {"projection": None, "output": None}
    assert without.model_copy(update=changes) == with_gu.model_copy(update=changes)


@pytest.mark.parametrize("recipe", SHIPPED, **by_name)
def test_header_says_what_for_what_not_and_how(recipe, run) -> None:
    text = recipe.read_text("utf-8")
    assert "\n# For:    " in text
    assert "\n# Avoid:  " in text
    commands, command = header(recipe), f"orthomerge unlearn recipes/unlearning/{recipe.name}"
    assert commands["Run"] == command
    assert commands["Check"] == f"{command} --dry-run"
    changed = shlex.split(commands["Change"])
    assert changed[:-1] == [*shlex.split(command), "--set"]
    assert load_unlearning(recipe, changed[-1:]) != load_unlearning(recipe), "it changes nothing"
    assert run(commands["Check"], "--json")


@pytest.mark.parametrize("recipe", TRAINED, **by_name)
def test_shipped_recipe_runs_small(recipe, run, place) -> None:
    output = yaml.safe_load(recipe.read_text("utf-8"))["output"]
    facts = json.loads(run(header(recipe)["Run"], *small(), "--json"))
    assert facts["steps"] == 2
    assert {row["name"] for row in facts["table"]} == {"forget", "retain", "holdout"}
    assert (place / output / "adapter_model.safetensors").exists()
    steps = (place / output / "unlearning_steps.jsonl").read_text("utf-8").splitlines()
    projected = [json.loads(line).get("projection") for line in steps]
    assert all(projected) if recipe.stem.endswith("-gu") else not any(projected)


@pytest.mark.parametrize("name", NEGATIONS)
def test_negation_runs(name, run, place) -> None:
    recipe = ROOT / f"recipes/unlearning/{name}.yaml"
    run(header(recipe)["Run"])
    output = place / load_unlearning(recipe).output
    assert (output / "model.safetensors").exists()


@pytest.mark.parametrize("objective", ["npo", "pdu", "ga"])
def test_template_of_an_objective_dry_runs_at_its_defaults(objective, run, tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    run(f"orthomerge init {objective} {path}")
    recipe = load_unlearning(path)
    info = all_objectives()[objective]
    request = unlearning_request(recipe)
    values = {name: p.default for name, p in info.parameters.items() if name not in info.required}
    assert values.items() <= dict(request.objective.parameters).items()
    assert request.objective.retain_weight == info.retain_weight
    assert run(f"orthomerge unlearn {path} --dry-run --json")


@pytest.mark.parametrize("objective", all_objectives())
def test_template_of_every_objective_is_the_registration(objective, tmp_path) -> None:
    info = all_objectives()[objective]
    path = tmp_path / "recipe.yaml"
    path.write_text(unlearning_template(info, path), "utf-8")
    plain = {"model": "models/tuned", "output": "unlearned", "objective": objective}
    bare = tmp_path / "bare.yaml"
    bare.write_text(yaml.safe_dump({**plain, "forget": "data/forget.jsonl"}), "utf-8")
    given = [f"{name}=1.0" for name in info.required]
    template, default = load_unlearning(path), load_unlearning(bare, given)
    for part in ("adapter", "data", "train", "stop", "seed"):
        assert getattr(template, part) == getattr(default, part)
    ours, theirs = (unlearning_request(r).objective for r in (template, default))
    assert ours.parameters == theirs.parameters
    assert (ours.retain, ours.forget_weight, ours.retain_weight) == (
        theirs.retain, theirs.forget_weight, theirs.retain_weight
    )  # fmt: skip


def test_validate_knows_both_kinds(run, capfd) -> None:
    line = "orthomerge validate recipes/ties.yaml recipes/unlearning/npo.yaml --json"
    assert len(json.loads(run(line))["valid"]) == 2
    assert is_unlearning({"model": "a"})
    assert not is_unlearning({"models": ["a"], "model": "b"})
    assert not is_unlearning(["a"])


def test_a_mistake_in_an_unlearning_recipe_is_reported_where_it_stands(tmp_path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("model: m\nforget: f\noutput: o\nobjective: npi\n", "utf-8")
    with pytest.raises(OrthoMergeError, match=r"wrong.yaml:4:1: .*npo"):
        load_any_recipe(path)
    path.write_text("model: m\nforget: f\noutput: o\ntrain: {steps: 1}\nholdot: h\n", "utf-8")
    with pytest.raises(ProblemsError, match="holdot") as caught:
        load_any_recipe(path)
    assert len(caught.value.problems) == 2


def test_init_names_the_nearest_of_both_kinds(tmp_path, capfd) -> None:
    assert run_guarded(app, ["init", "simpno", str(tmp_path / "r.yaml")]) == 4
    assert "Did you mean 'simnpo'?" in capfd.readouterr().err
    assert not (tmp_path / "r.yaml").exists()


def test_values_of_the_projection_are_read_and_refused_all_at_once(tmp_path) -> None:
    recipe = ROOT / "recipes/unlearning/npo-gu.yaml"
    given = ["row_dtype=bfloat16", "rows=[batch, history]", "history=2", "granularity=[a, b]",
             "rtol=null", "restore=0", "scope=lora_A", "bank_rows=4"]  # fmt: skip
    request = unlearning_request(load_unlearning(recipe, [f"projection.{g}" for g in given]))
    assert request.bank_rows == 4
    assert request.projection is not None
    assert request.projection["row_dtype"] is torch.bfloat16
    assert request.projection["scope"] == "lora_A"
    wrong = ["row_dtype=int8", "rows=batch", "history=true", "restore=low", "allow_approximate=1",
             "rtol=x", "mode=3", "bnak=1", "bank_rows=0"]  # fmt: skip
    with pytest.raises(ProblemsError) as caught:
        load_unlearning(recipe, [f"projection.{word}" for word in wrong])
    assert len(caught.value.problems) == len(wrong)
    assert all("npo-gu.yaml:2" in str(problem) for problem in caught.value.problems)
    with pytest.raises(OrthoMergeError, match="Did you mean 'gu'"):
        load_unlearning(recipe, ["projection=guu"])
    with pytest.raises(OrthoMergeError, match="restore is out of range"):
        load_unlearning(recipe, ["projection.restore=-1"])


def test_methods_shows_an_objective_by_its_other_name(run) -> None:
    assert json.loads(run("orthomerge methods show idk-dpo --json"))["name"] == "dpo"
