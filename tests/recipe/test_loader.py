"""Recipes: strictness, positions, overrides."""

from __future__ import annotations

import pytest

from orthomerge.errors import OrthoMergeError, ProblemsError, RecipeError
from orthomerge.recipe.loader import load_recipe
from orthomerge.recipe.run import request_from
from orthomerge.recipe.schema import MergeRecipe
from orthomerge.recipe.sizes import format_size, parse_size
from orthomerge.recipe.validation import apply_settings

GOOD = """\
method: ties
base: models/base
models:
  - models/a
  - path: models/b
    weight: [0.2, 0.8]
parameters:
  density:
    - {match: "*.mlp.*", value: 0.1}
    - value: 0.3
output:
  path: merged
  max_shard_size: 2GB
  dtype: bf16
run: {workers: 2, memory_budget: 1GiB}
"""


@pytest.fixture
def load(tmp_path):
    def load(text, settings=()):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return load_recipe(path, settings)

    return load


def problems(load, text, settings=()) -> list[OrthoMergeError]:
    with pytest.raises(OrthoMergeError) as caught:
        load(text, settings)
    error = caught.value
    return list(error.problems) if isinstance(error, ProblemsError) else [error]


def test_good_recipe_becomes_a_request(load) -> None:
    request = request_from(load(GOOD))
    assert request.models == ("models/a", "models/b")
    assert request.weights == (1.0, [0.2, 0.8])
    assert request.max_shard_bytes == 2 * 10**9
    assert request.memory_budget_bytes == 2**30
    assert request.workers == 2


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (GOOD.replace("base:", "bse:"), "2:1", "Did you mean 'base'"),
        (GOOD.replace("  dtype:", "  dtyp:"), "14:3", "Did you mean 'dtype'"),
        (GOOD.replace("    weight:", "    wieght:"), "6:5", "Did you mean 'weight'"),
        (GOOD.replace("density:", "densty:"), "8:3", "Did you mean 'density'"),
        (GOOD.replace("method: ties", "method: tais"), "1:1", "Did you mean 'ties'"),
        (GOOD.replace("value: 0.1", "value: 1.1"), "8:3", "density"),
        (GOOD.replace("2GB", "2XB"), "13:3", "not a size"),
        (GOOD.replace("bf16", "int8"), "14:3", "floating-point dtype"),
        (GOOD.replace("workers: 2", "workers: 0"), "15:7", "greater than or equal to 1"),
        (GOOD.replace("[0.2, 0.8]", "[0.2, hi]"), "6:5", "weight"),
        (GOOD.replace("models:", "models: 3\nx:"), "3:1", "models"),
        ("method: ties\n", "", "'models' is missing"),
        ("models: []\n", "1:1", "at least 1 item"),
        ("a: 1\na: 2\nmodels: [x]\n", "2:1", "appears twice"),
        ("models: [x\n", "2:1", "not valid YAML"),
        ("- 1\n- 2\n", "", "mapping"),
        ("models: !!python/object:os.system [x]\n", "", "not valid YAML"),
    ],
)
def test_errors_name_line_column_and_remedy(load, text, place, words) -> None:
    found = [str(problem) for problem in problems(load, text)]
    assert any(words in line and f"r.yaml:{place}".rstrip(":") in line for line in found), found


def test_all_errors_at_once(load) -> None:
    text = GOOD.replace("base:", "bse:").replace("2GB", "2XB").replace("workers: 2", "workers: x")
    assert len(problems(load, text)) == 3


def test_settings_are_parameters_or_dotted_paths(load) -> None:
    recipe = load(GOOD, ["density=0.5", "output.dtype=float32", "models.0.weight=0.4"])
    assert recipe.parameters["density"] == 0.5
    assert recipe.output.dtype == "float32"
    assert recipe.models[0].weight == 0.4


def test_scientific_notation_is_a_number(load) -> None:
    assert load(GOOD.replace("value: 0.3", "value: 3e-1"), ["scale=5e-1"]).parameters == {
        "density": [{"match": "*.mlp.*", "value": 0.1}, {"value": 0.3}],
        "scale": 0.5,
    }


def test_settings_do_not_change_the_given_data() -> None:
    data = {"models": ["x"], "output": {"path": "a"}}
    assert apply_settings(data, ["output.path=b"], MergeRecipe)["output"]["path"] == "b"
    assert data["output"]["path"] == "a"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("density", "key=value"),
        ("=3", "key=value"),
        ("density=[", "not valid YAML"),
        ("models.7.weight=1", "no entry 7"),
        ("method.x=1", "has no parts"),
        ("densty=0.3", "Did you mean 'density'"),
    ],
)
def test_bad_settings_are_named(load, setting, words) -> None:
    assert words in str(problems(load, GOOD, [setting])[0])


def test_missing_or_binary_file_is_named(tmp_path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "b.yaml")


def test_alias_bomb_is_refused(load) -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for inner, outer in zip("abcdef", "bcdefg", strict=True):
        lines.append(f"{outer}: &{outer} [{', '.join([f'*{inner}'] * 10)}]")
    assert "too large" in str(problems(load, "\n".join([*lines, "models: [x]"]))[0])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (123, 123), ("1_000", 1000), ("2g", 2 * 10**9)],
)
def test_sizes_are_parsed(text, wanted) -> None:
    assert parse_size(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "1 fortnight", "1e9"])
def test_bad_sizes_are_refused(text) -> None:
    with pytest.raises(RecipeError, match="not a size"):
        parse_size(text)


def test_sizes_are_readable() -> None:
    assert [format_size(n) for n in (5, 1500, 748e6, 2e12)] == [
        "5 B",
        "1.5 kB",
        "748.0 MB",
        "2.0 TB",
    ]
