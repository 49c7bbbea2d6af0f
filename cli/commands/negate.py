"""``orthomerge negate``: the adapter that undoes an adapter."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say


def negate(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hf:org/name.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make.")],
    strength: Annotated[
        float, typer.Option("--strength", "-s", help="How much of it to undo; 1 is all.")
    ] = 1.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    json: Json = False,
) -> None:
    """Write the adapter that undoes an adapter: R becomes its inverse, B A becomes -B A."""
    from orthomerge.extraction.negating import negate as run

    result = run(adapter, output, strength=strength, overwrite=overwrite)
    if json:
        return print_json(dataclasses.asdict(result))
    say(f"{result.kind} undone at strength {strength:g}, {result.tensors} tensors", err=True)
    say(str(result.output))
