"""The shape of the house: who imports whom, how long files and functions are, what is lazy."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthomerge.merging.registry import LAWS, all_methods
from orthomerge.recipe.schema import MergeRecipe
from orthomerge.unlearning.objectives.registry import all_objectives

ROOT = Path(__file__).parent.parent
PACKAGES = {"orthomerge": ROOT / "orthomerge", "orthomerge_cli": ROOT / "cli"}

# Room -> rooms it may import, beside itself and errors.
ALLOWED = {
    "errors": set(),
    "version": set(),
    "parameters": set(),
    "quiet": set(),
    "catalogue": set(),
    "linalg": set(),
    "checkpoints": set(),
    "adapters": {"linalg", "checkpoints"},
    "merging": {"linalg", "checkpoints", "adapters", "parameters", "catalogue"},
    "unlearning": {"linalg", "checkpoints", "adapters", "parameters", "quiet", "catalogue"},
    "diagnostics": {"linalg", "checkpoints", "adapters"},
    "extraction": {"linalg", "checkpoints", "adapters", "diagnostics"},
    "recipe": {
        "linalg",
        "checkpoints",
        "adapters",
        "merging",
        "parameters",
        "unlearning",
        "diagnostics",
    },
    "demo": {"linalg", "checkpoints", "adapters", "quiet"},
}
# Inside the unlearning room: who may look into whom.
INNER = {"data": set(), "objectives": set(), "projection": set()}
INNER["training"] = set(INNER)
PURE = (
    "orthomerge/linalg",
    "orthomerge/merging/methods",
    "orthomerge/merging/steps",
    "orthomerge/unlearning/objectives",
    "orthomerge/unlearning/projection",
)
IMPURE = {"os", "pathlib", "logging", "json", "pydantic", "io", "shutil", "subprocess"}
LAZY = {"transformers", "peft", "matplotlib", "sklearn", "ray", "huggingface_hub"}
LAZY |= {"datasets", "pyarrow"}
# Modules with classes that derive from transformers'; they are loaded when such a class is used.
HEAVY = {
    f"orthomerge.unlearning.training.{name}"
    for name in ("callbacks", "trainer", "sessions", "running")
}
MAX_FILE, MAX_FUNCTION = 400, 60


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in PACKAGES.values():
        for path in sorted(folder.rglob("*.py")):
            yield path, ast.parse(path.read_text("utf-8"))


def _imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield (module, whether the import runs when the file is imported)."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        eager = id(node) not in inside and id(node) not in typing_only
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", eager


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts)


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "cli" if parts[0] == "cli" else parts[1].removesuffix(".py")


def test_rooms_import_only_what_is_below_them() -> None:
    wrong = []
    for path, tree in _sources():
        room = _room(path)
        if room in ("__init__", "cli"):
            continue
        for module, _ in _imports(tree):
            parts = module.split(".")
            inside = parts[0] == "orthomerge" and len(parts) > 1
            if inside and parts[1] not in ALLOWED[room] | {room, "errors", "version"}:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_nothing_imports_the_command_line() -> None:
    wrong = [
        str(path)
        for path, tree in _sources()
        for module, _ in _imports(tree)
        if _room(path) != "cli" and module.split(".")[0] in ("cli", "orthomerge_cli", "typer")
    ]
    assert not wrong


def test_pure_rooms_touch_no_files_settings_or_logs() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path, tree in _sources()
        if path.relative_to(ROOT).as_posix().startswith(PURE)
        for module, _ in _imports(tree)
        if module.split(".")[0] in IMPURE
    ]
    assert not wrong


def test_heavy_packages_are_imported_inside_functions() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path, tree in _sources()
        for module, eager in _imports(tree)
        if eager and (module.split(".")[0] in LAZY or module in HEAVY)
        if _module(path) not in HEAVY
    ]
    assert not wrong


def test_parts_of_unlearning_keep_apart() -> None:
    wrong = []
    for path, tree in _sources():
        room, part = (*_module(path).split(".")[1:3], "")[:2]
        if room != "unlearning" or part not in INNER:
            continue
        allowed = {f"orthomerge.unlearning.{name}" for name in INNER[part] | {part}}
        for module, _ in _imports(tree):
            if module.startswith("orthomerge.unlearning.") and not any(
                module == name or module.startswith(f"{name}.") for name in allowed
            ):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_files_and_functions_stay_short() -> None:
    wrong = []
    for path, tree in _sources():
        lines = path.read_text("utf-8").count("\n")
        if lines > MAX_FILE:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                is_command = _room(path) == "cli" and len(node.args.args) > 10
                if length > MAX_FUNCTION and not is_command:
                    wrong.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not wrong


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty_names = {"utils", "helpers", "common", "misc"}
    assert not [str(path) for path, _ in _sources() if path.stem in empty_names]


def test_public_library_names_have_docstrings() -> None:
    wrong = []
    for path, tree in _sources():
        if not ast.get_docstring(tree):
            wrong.append(str(path.relative_to(ROOT)))
        for node in ast.walk(tree):
            is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if is_definition and _is_public(tree, node) and not ast.get_docstring(node):
                wrong.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not wrong


def _is_public(tree: ast.Module, node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Public top-level definitions and the public methods of public top-level classes."""
    if node.name.startswith("_"):
        return False
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    return node in tree.body or any(node in cls.body for cls in classes)


def test_every_package_folder_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join([name, *init.parent.relative_to(folder).parts])
        for name, folder in PACKAGES.items()
        for init in folder.rglob("__init__.py")
    }
    assert listed == found


def test_every_method_file_registers_one_method() -> None:
    files = {p.stem for p in (ROOT / "orthomerge/merging/methods").glob("*.py")} - {"__init__"}
    homes = {m.function.__module__.rpartition(".")[2] for m in all_methods().values()}
    assert homes == files


def test_every_loss_file_registers_one_objective() -> None:
    files = {p.stem for p in (ROOT / "orthomerge/unlearning/objectives/losses").glob("*.py")}
    homes = {o.function.__module__.rpartition(".")[2] for o in all_objectives().values()}
    assert homes == files - {"__init__"}


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda method: method.name)
def test_registration_is_complete(method) -> None:
    assert method.summary.endswith(".")
    assert method.reference
    assert method.laws <= set(LAWS)
    assert all(parameter.help for parameter in method.parameters.values())
    assert not set(method.parameters) & set(MergeRecipe.model_fields), "--set would be ambiguous"


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ["torch", "numpy", "pydantic", "orthomerge.merging"]),
        (["methods", "list"], ["torch", "transformers", "peft"]),
        (["init", "ties", "{tmp}/r.yaml"], ["torch", "transformers", "peft"]),
        (["plan", "{tmp}/a.safetensors", "{tmp}/a.safetensors"], ["torch", "transformers", "peft"]),
    ],
    ids=lambda value: value[0],
)
def test_command_does_not_import(arguments, absent, tmp_path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    script = (
        "import sys\n"
        "from orthomerge_cli.main import app\n"
        f"try: app({[a.format(tmp=tmp_path) for a in arguments]!r})\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"print('FOUND', [m for m in {absent!r} if m in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("FOUND []"), run.stdout[-300:]


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, orthomerge; print([m for m in ('torch', 'peft') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
