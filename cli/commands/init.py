"""``orthomerge init``: write a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say


def init(
    method: Annotated[str, typer.Argument(help="Method id, see `orthomerge methods list`.")],
    path: Annotated[Path, typer.Argument(help="Recipe to write.")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json: Json = False,
) -> None:
    """Write a commented recipe for a method, with every parameter at its default."""
    from orthomerge.errors import OutputError
    from orthomerge.merging.registry import get_method
    from orthomerge.recipe.template import recipe_template

    text = recipe_template(get_method(method), path)
    if path.exists() and not overwrite:
        raise OutputError(
            "the file already exists", file=path, remedy="Choose another name or pass --overwrite."
        )
    path.write_text(text, "utf-8")
    if json:
        print_json({"recipe": str(path), "method": method})
    else:
        say(f"wrote {path}; edit the paths, then run: orthomerge plan --recipe {path}")
