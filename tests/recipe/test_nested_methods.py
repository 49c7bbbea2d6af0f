"""A method inside a method in recipes and overrides: every error with its line and column."""

from __future__ import annotations

import pytest

from orthomerge.errors import OrthoMergeError, ProblemsError
from orthomerge.recipe.loader import load_recipe

HEAD = "models:\n  - a\n  - b\nbase: c\nmethod: orthomerge-decoupled\nparameters:\n"


def load(tmp_path, parameters: str, *settings: str):
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + parameters)
    return load_recipe(path, settings).parameters


@pytest.mark.parametrize(
    ("parameters", "place", "words"),
    [
        ("  residual:\n    method: ties\n    densty: 0.2\n", "9:5", "Did you mean 'density'"),
        ("  residual:\n    method: ties\n    density: 1.2\n", "9:5", "in (0, 1], found 1.2"),
        ("  residual: {method: linear}\n", "7:14", "task-arithmetic | ties | tsv-m, found linear"),
        ("  residual: {method: tsv}\n", "7:14", "Did you mean 'tsv-m'"),
        ("  residual: {density: 0.2}\n", "7:3", "with the key method"),
        ("  residual: linear\n", "7:3", "merges task vectors"),
        ("  residul: ties\n", "7:3", "Did you mean 'residual'"),
        ("  margin: 0.1\n  gate: on\n", "8:3", "auto | off"),
    ],
)
def test_errors_say_where(tmp_path, parameters, place, words) -> None:
    with pytest.raises(OrthoMergeError) as caught:
        load(tmp_path, parameters)
    assert f"r.yaml:{place}: " in str(caught.value)
    assert words in str(caught.value)


def test_all_nested_problems_are_reported(tmp_path) -> None:
    text = "  residual:\n    method: ties\n    densty: 0.2\n    scope: all\n    scale: x\n"
    with pytest.raises(ProblemsError) as caught:
        load(tmp_path, text)
    places = [problem.file.rpartition("r.yaml:")[2] for problem in caught.value.problems]
    assert places == ["9:5", "10:5", "11:5"]


@pytest.mark.parametrize(
    "settings",
    [
        ("residual=ties", "residual.density=0.3"),
        ("residual.method=ties", "residual.density=0.3"),
        ("residual={method: ties, density: 0.3}",),
    ],
)
def test_overrides_build_a_nested_method(tmp_path, settings) -> None:
    wanted = {"method": "ties", "density": 0.3}
    assert load(tmp_path, "  margin: 0.1\n", *settings)["residual"] == wanted
    assert load(tmp_path, "  residual: tsv-m\n", *settings)["residual"] == wanted


def test_override_of_a_parameter_needs_a_method(tmp_path) -> None:
    with pytest.raises(OrthoMergeError, match="with the key method"):
        load(tmp_path, "  margin: 0.1\n", "residual.density=0.3")
    found = load(tmp_path, "  residual: ties\n", "residual.density=0.3")["residual"]
    assert found == {"method": "ties", "density": 0.3}


def test_a_bare_off_is_off(tmp_path) -> None:
    """YAML reads off as false; the plan must take it for the word."""
    import torch

    from orthomerge import plan

    parameters = load(tmp_path, "  gate: off\n")
    assert load(tmp_path, "  margin: 0.1\n", "gate=off")["gate"] == parameters["gate"]
    W = {"a.weight": torch.ones(2, 2)}
    (task,) = plan([W, W], base=W, method="orthomerge-decoupled", **parameters).tasks
    assert task.parameters["gate"] == "off"


def test_rules_choose_a_residual_method_per_layer() -> None:
    import torch

    from orthomerge import plan

    names = ("layers.0.a.weight", "layers.1.a.weight")
    W = {name: torch.ones(2, 2) for name in names}
    rules = [
        {"match": "layers.0.*", "value": {"method": "ties", "density": 0.5}},
        {"value": "tsv-m"},
    ]
    tasks = plan([W, W], base=W, method="orthomerge-decoupled", residual=rules).tasks
    chosen = {task.name: task.parameters["residual"]["method"] for task in tasks}
    assert chosen == dict(zip(names, ("ties", "tsv-m"), strict=True))
