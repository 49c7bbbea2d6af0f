"""``orthomerge diff``: how far two models are apart, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say


def diff(
    first: Annotated[str, typer.Argument(help="File, folder or hf:org/name.")],
    second: Annotated[str, typer.Argument(help="What to compare it with.")],
    top: Annotated[int, typer.Option("--top", "-n", min=1, help="Tensors to print.")] = 20,
    fail_above: Annotated[
        float | None,
        typer.Option("--fail-above", help="Exit with 7 if a relative change exceeds this."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare two models: relative change per tensor, largest first."""
    from orthomerge.checkpoints.sources import open_checkpoint
    from orthomerge.diagnostics.difference import diff_checkpoints
    from orthomerge.errors import VerificationError

    found = diff_checkpoints(open_checkpoint(first), open_checkpoint(second))
    changed = [d for d in found if d.status != "equal"]
    if json:
        print_json(
            {
                "first": first,
                "second": second,
                "tensors": len(found),
                "changed": len(changed),
                "differences": [dataclasses.asdict(d) for d in found],
            }
        )
    else:
        say(f"{len(changed)} of {len(found)} tensors differ")
        for d in changed[:top]:
            size = "         " if d.relative is None else f"{d.relative:9.3e}"
            angle = "" if d.cosine is None else f"  cos {d.cosine:.6f}"
            say(f"{size}{angle}  {d.status:<11} {d.name}  {d.note}".rstrip())
        if len(changed) > top:
            say(f"… and {len(changed) - top} more (--top, --json)")
    if fail_above is not None:
        too_far = [
            d
            for d in changed
            if d.relative is None or math.isnan(d.relative) or d.relative > fail_above
        ]
        if too_far:
            raise VerificationError(
                f"{len(too_far)} tensors differ by more than {fail_above:g}",
                file=second,
                tensor=too_far[0].name,
                found=too_far[0].status if too_far[0].relative is None else too_far[0].relative,
            )
