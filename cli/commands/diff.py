"""``orthomerge diff``: how far two models are apart, tensor by tensor."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say

if TYPE_CHECKING:
    from orthomerge.diagnostics.difference import TensorDifference
    from orthomerge.errors import VerificationError


def diff(
    first: Annotated[str, typer.Argument(help="File, folder or hf:org/name.")],
    second: Annotated[str, typer.Argument(help="What to compare it with.")],
    top: Annotated[int, typer.Option("--top", "-n", min=1, help="Tensors to print.")] = 20,
    fail_above: Annotated[
        float | None,
        typer.Option("--fail-above", help="Exit with 7 if a relative change exceeds this."),
    ] = None,
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="Compare LoRA adapters as stored, not by their changes."),
    ] = False,
    json: Json = False,
) -> None:
    """Compare two models: relative change per tensor, largest first.

    Two LoRA adapters are compared by what they change, B A per module: many factors make one.
    """
    found, what = _compare(first, second, tensors=tensors)
    changed = [d for d in found if d.status != "equal"]
    failure = _failure(changed, what, fail_above, second)
    if json:
        facts = {
            "first": first,
            "second": second,
            "tensors": len(found),
            "changed": len(changed),
            "differences": [dataclasses.asdict(d) for d in found],
        }
        print_json(facts | (failure.as_dict() if failure else {}))
        raise typer.Exit(failure.exit_code if failure else 0)
    say(f"{len(changed)} of {len(found)} {what} differ")
    for d in changed[:top]:
        size = "         " if d.relative is None else f"{d.relative:9.3e}"
        angle = "" if d.cosine is None else f"  cos {d.cosine:.6f}"
        say(f"{size}{angle}  {d.status:<11} {d.name}  {d.note}".rstrip())
    if len(changed) > top:
        say(f"… and {len(changed) - top} more (--top, --json)")
    if failure:
        raise failure


def _compare(
    first: str, second: str, *, tensors: bool
) -> tuple[list[TensorDifference], Literal["tensors", "modules"]]:
    """Return the differences, and of what they are."""
    from orthomerge.adapters.sources import open_source
    from orthomerge.checkpoints.sources import open_checkpoint
    from orthomerge.diagnostics.difference import diff_checkpoints, diff_sources

    if tensors:
        return diff_checkpoints(open_checkpoint(first), open_checkpoint(second)), "tensors"
    sources = open_source(first), open_source(second)
    products = all(source.lora is not None for source in sources)
    return diff_sources(*sources), "modules" if products else "tensors"


def _failure(
    changed: list[TensorDifference], what: str, fail_above: float | None, second: str
) -> VerificationError | None:
    """Return the error of a comparison that was to be closer."""
    from orthomerge.errors import VerificationError

    if fail_above is None:
        return None
    near = [d.relative is not None and d.relative <= fail_above for d in changed]
    too_far = [d for d, is_near in zip(changed, near, strict=True) if not is_near]
    if not too_far:
        return None
    first = too_far[0]
    return VerificationError(
        f"{len(too_far)} {what} differ by more than {fail_above:g}",
        file=second,
        tensor=first.name,
        found=first.status if first.relative is None else first.relative,
    )
