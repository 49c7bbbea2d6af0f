"""The documentation runs: every bash, python and yaml block, every link, every table of methods."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from orthomerge_cli.main import app
from orthomerge_cli.session import run_guarded

from orthomerge.merging import registry
from orthomerge.merging.registry import all_methods
from orthomerge.recipe.loader import recipe_from_data
from orthomerge.recipe.yaml_positions import load_yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "recipe"))
from test_shipped_recipes import write_source  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    found = []
    for page in PAGES:
        for at, match in enumerate(BLOCK.finditer(page.read_text("utf-8"))):
            if match[1] == language:
                identity = f"{page.relative_to(ROOT)}-{at}"
                found.append(pytest.param(match[2], id=identity))
    return found


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The folder that the pages speak of."""
    monkeypatch.chdir(tmp_path)
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
            assert run_guarded(app, arguments) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block, monkeypatch, capsys) -> None:
    registry.all_methods()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    exec(compile(block, "page", "exec"), {"__name__": "page"})
    promised = re.findall(r"# (?:tensor\()?\[*([\d.]+)", block)
    printed = capsys.readouterr().out
    assert all(number in printed for number in promised)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipes_on_the_pages_are_valid(block) -> None:
    assert recipe_from_data(load_yaml(block, "page")).models


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
