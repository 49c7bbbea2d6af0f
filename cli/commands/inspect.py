"""``orthomerge inspect``: what a file or folder is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say

if TYPE_CHECKING:
    from orthomerge.diagnostics.inspection import Inspection


def inspect(
    source: Annotated[str, typer.Argument(help="File, folder or hf:org/name.")],
    tensors: Annotated[bool, typer.Option("--tensors", "-t", help="List every tensor.")] = False,
    digest: Annotated[
        bool, typer.Option("--hash", help="Read all data and print the content digest.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what a file or folder is: kind, tensors, dtypes, sizes, provenance."""
    from orthomerge.diagnostics.inspection import inspect_source

    found = inspect_source(source, digest=digest)
    if json:
        print_json(_facts(found))
    else:
        _print(found, tensors)


def _facts(found: Inspection) -> dict[str, Any]:
    return {
        "origin": found.origin,
        "kind": found.kind,
        "architecture": found.architecture,
        "files": found.files,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "dtypes": {d: {"tensors": n, "bytes": b} for d, (n, b) in found.dtypes.items()},
        "details": found.details,
        "digest": found.digest,
        "provenance": found.provenance,
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes}
            for t in found.tensors
        ],
    }


def _print(found: Inspection, tensors: bool) -> None:
    from orthomerge.recipe.sizes import format_size

    def line(label: str, value: object) -> None:
        say(f"{label:<20}{value}")

    line("source", found.origin)
    line("kind", found.kind + (f", {found.architecture}" if found.architecture else ""))
    line("files", f"{len(found.files)}: {', '.join(found.files[:4])}")
    line("parameters", f"{found.parameters:,} in {len(found.tensors)} tensors")
    line("size", format_size(found.nbytes))
    for dtype, (count, nbytes) in found.dtypes.items():
        line("", f"{dtype}: {count} tensors, {format_size(nbytes)}")
    for key, value in found.details.items():
        if value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            line(key.replace("_", " "), text)
    if found.digest:
        line("digest", found.digest)
    if found.provenance:
        origins = ", ".join(s["origin"] for s in found.provenance.get("sources", []))
        line("merged by", f"orthomerge {found.provenance['orthomerge']}")
        line("method", found.provenance.get("method"))
        line("from", origins)
    if tensors:
        width = max((len(t.name) for t in found.tensors), default=0)
        for info in found.tensors:
            say(f"{info.name:<{width}}  {info.dtype:<5} {list(info.shape)}")
