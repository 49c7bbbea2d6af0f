"""The documentation runs: every bash, python and yaml block, every link, every table of methods."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from orthomerge_cli.main import app
from orthomerge_cli.session import run_guarded

from orthomerge.merging import registry
from orthomerge.merging.registry import all_methods
from orthomerge.recipe.kinds import any_recipe_from_data
from orthomerge.recipe.yaml_positions import load_yaml
from orthomerge.unlearning.objectives import all_objectives
from orthomerge.unlearning.objectives import registry as objectives

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "recipe"))
from test_shipped_recipes import write_source  # noqa: E402
from unlearning_place import SMALL, write_unlearning_place  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    found = []
    for page in PAGES:
        for at, match in enumerate(BLOCK.finditer(page.read_text("utf-8"))):
            if match[1] == language:
                identity = f"{page.relative_to(ROOT)}-{at}"
                found.append(pytest.param(match[2], id=identity))
    return found


def outputs():
    """Return the code of every block whose output the page shows below it."""
    return [
        pytest.param(*match.groups(), id=str(page.relative_to(ROOT)))
        for page in PAGES
        for match in OUTPUT.finditer(page.read_text("utf-8"))
    ]


@pytest.fixture(scope="session")
def unlearning_place(tmp_path_factory):
    return write_unlearning_place(tmp_path_factory.mktemp("unlearning"))


@pytest.fixture
def workplace(tmp_path, monkeypatch, unlearning_place):
    """The folder that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unlearning_place, tmp_path, dirs_exist_ok=True)
    for seed, name in enumerate(["base", "first", "second", "code", "maths"]):
        write_source(tmp_path / "models" / name, seed)
    for seed, name in enumerate(["first", "second"]):
        write_source(tmp_path / "adapters" / name, seed)
        write_source(tmp_path / "loras" / name, seed)
    for name in ("first", "second"):
        (tmp_path / "models" / name / "config.json").write_text('{"torch_dtype": "float32"}')
    (tmp_path / "a.safetensors").symlink_to("models/first/model.safetensors")
    (tmp_path / "b.safetensors").symlink_to("models/second/model.safetensors")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_run_in_order(page, workplace, capsys) -> None:
    matches = BLOCK.finditer(page.read_text("utf-8"))
    for block in (match[2] for match in matches if match[1] == "bash"):
        for line in block.strip().splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "orthomerge"
            if arguments[0] == "unlearn" and "negat" not in line and "rotation" not in line:
                arguments += [word for setting in SMALL for word in ("--set", setting)]
            assert run_guarded(app, arguments) == 0, f"{line}\n{capsys.readouterr().err}"


SHOWN = {shown.values[0] for shown in outputs()}


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.values[0] not in SHOWN])
def test_python_runs(block, monkeypatch, capsys, workplace) -> None:
    for catalogue, load in ((registry, all_methods), (objectives, all_objectives)):
        load()
        monkeypatch.setattr(catalogue, "_REGISTRY", dict(catalogue._REGISTRY))
    block = block.replace('"max_steps": 200', '"max_steps": 2')
    exec(compile(block, "page", "exec"), {"__name__": "page"})
    promised = re.findall(r"# (?:tensor\()?\[*([\d.]+)", block)
    printed = capsys.readouterr().out
    assert all(number in printed for number in promised)


@pytest.mark.parametrize(("code", "output"), outputs())
def test_output_on_a_page_is_what_its_code_prints(code, output, capsys, workplace) -> None:
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipes_on_the_pages_are_valid(block) -> None:
    assert any_recipe_from_data(load_yaml(block, "page")).output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text("utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page) -> None:
    named = re.findall(
        r"`((?:tests|benchmarks|orthomerge|cli)/[\w/]+\.\w+)`", page.read_text("utf-8")
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_method_has_a_page_and_a_row() -> None:
    index = (ROOT / "docs/methods/index.md").read_text("utf-8")
    for name, method in all_methods().items():
        assert (ROOT / f"docs/methods/{name}.md").exists()
        row = next(line for line in index.splitlines() if line.startswith(f"| [{name}]"))
        assert all(parameter in row for parameter in method.parameters)


def written(value) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def test_table_of_objectives_is_the_registration() -> None:
    page = (ROOT / "docs/objectives.md").read_text("utf-8")
    lines = (line.strip("|").split("|") for line in page.splitlines() if line.startswith("| "))
    cells = [[cell.strip() for cell in line] for line in lines]
    rows = {row[0]: row[2:] for row in cells if len(row) == 8 and row[0] != "objective"}
    needs = {
        "reference scores": objectives.Need.REFERENCE_SCORES,
        "reference logits": objectives.Need.REFERENCE_LOGITS,
        "other answers": objectives.Need.ALTERNATES,
        "hidden states": objectives.Need.HIDDEN,
    }
    assert set(rows) == set(all_objectives())
    for name, info in all_objectives().items():
        gamma, alpha, retain, parameters, needed, reference = rows[name]
        assert (float(gamma), float(alpha)) == (info.forget_weight, info.retain_weight), name
        assert (retain, reference) == (info.retain, info.reference), name
        defaults = {p.name: written(p.default) for p in info.parameters.values()}
        defaults |= dict.fromkeys(info.required, "must be given")
        assert parameters == ", ".join(f"{n} ({d})" for n, d in defaults.items()), name
        assert {needs[need] for need in needed.split(", ") if need} == info.needs, name


def test_quirks_of_published_code_have_a_row() -> None:
    page = (ROOT / "docs/objectives.md").read_text("utf-8")
    quirks = page.partition("| | published code |")[2]
    found = {line.split("|")[1].strip() for line in quirks.splitlines() if line.startswith("| ")}
    assert found == {n for n, info in all_objectives().items() if info.takes_compat} | {"`kl`"}


def test_exit_codes_in_the_docs_are_those_of_the_errors() -> None:
    from orthomerge import errors

    page = (ROOT / "docs/outputs.md").read_text("utf-8")
    codes = {getattr(errors, name).exit_code for name in errors.__all__ if name.endswith("Error")}
    assert all(f"| {code} |" in page for code in codes | {0, 2, 130})


def test_example_settings_of_yaml_pages_are_complete() -> None:
    text = BLOCK.search((ROOT / "docs/recipes.md").read_text("utf-8"))[2]
    from orthomerge.recipe.schema import MergeRecipe, OutputSettings, RunSettings

    data = yaml.safe_load(text)
    assert set(data) == set(MergeRecipe.model_fields)
    assert set(data["output"]) == set(OutputSettings.model_fields)
    assert set(data["run"]) == set(RunSettings.model_fields)
