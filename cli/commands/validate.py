"""``orthomerge validate``: check recipe files without opening a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from orthomerge_cli.options import Json, Set
from orthomerge_cli.session import print_json, say


def validate(
    recipes: Annotated[list[Path], typer.Argument(help="YAML recipes.")],
    settings: Set = None,
    json: Json = False,
) -> None:
    """Check recipes: keys, types, method, parameters. Neither models nor rows are opened.

    A recipe with the key models is one of merging, one with the key model one of unlearning.
    Every problem of every file is reported, with line and column.
    """
    from orthomerge.errors import OrthoMergeError, ProblemsError, combined
    from orthomerge.recipe.kinds import load_any_recipe

    problems: list[OrthoMergeError] = []
    for path in recipes:
        try:
            load_any_recipe(path, settings or [])
        except ProblemsError as error:
            problems += error.problems
        except OrthoMergeError as error:
            problems.append(error)
    if problems:
        raise combined(problems)
    if json:
        print_json({"valid": [str(path) for path in recipes]})
    else:
        for path in recipes:
            say(f"{path}: valid")
