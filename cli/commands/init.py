"""``orthomerge init``: write a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say


def init(
    method: Annotated[
        str, typer.Argument(help="Method or objective id, see `orthomerge methods list`.")
    ],
    path: Annotated[Path, typer.Argument(help="Recipe to write.")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json: Json = False,
) -> None:
    """Write a commented recipe for a merge method or an unlearning objective, all at defaults."""
    from orthomerge.errors import OutputError

    text, check = _template(method, path)
    if path.exists() and not overwrite:
        raise OutputError(
            "the file already exists", file=path, remedy="Choose another name or pass --overwrite."
        )
    path.write_text(text, "utf-8")
    if json:
        print_json({"recipe": str(path), "method": method})
    else:
        say(f"wrote {path}; edit the paths, then run: {check}")


def _template(name: str, path: Path) -> tuple[str, str]:
    """Return the recipe of a method or objective, and the command that checks it."""
    from orthomerge.errors import UnknownNameError
    from orthomerge.merging.registry import all_methods, get_method
    from orthomerge.recipe.template import recipe_template
    from orthomerge.recipe.unlearning_template import unlearning_template
    from orthomerge.unlearning.objectives import all_objectives, get_objective

    try:
        return recipe_template(get_method(name), path), f"orthomerge plan --recipe {path}"
    except UnknownNameError:
        pass
    try:
        text = unlearning_template(get_objective(name), path)
    except UnknownNameError:
        known = [*all_methods(), *all_objectives()]
        raise UnknownNameError("method or objective", name, known) from None
    return text, f"orthomerge unlearn {path} --dry-run"
