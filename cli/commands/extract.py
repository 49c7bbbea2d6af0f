"""``orthomerge extract``: a full fine-tune as adapters, and how much of it they explain."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from orthomerge_cli.options import Budget, Json
from orthomerge_cli.session import print_json, say

if TYPE_CHECKING:
    from orthomerge.extraction.run import ExtractResult


def extract(
    model: Annotated[str, typer.Argument(help="The fine-tune: file, folder or hf:org/name.")],
    base: Annotated[str, typer.Option("--base", help="Model it was fine-tuned from.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make.")],
    kind: Annotated[str, typer.Option("--kind", "-k", help="oft+lora, oft or lora.")] = "oft+lora",
    lora: Annotated[bool, typer.Option("--lora", help="The same as --kind lora.")] = False,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Most rank; default 16, or any with --energy alone."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Smallest rank that keeps this share, e.g. 0.95."),
    ] = None,
    block_size: Annotated[
        int, typer.Option("--block-size", help="OFT block size, moved to a divisor per layer.")
    ] = 32,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", help="Pattern of weights, e.g. '*q_proj'; default: all linear."),
    ] = None,
    anchor: Annotated[
        float, typer.Option("--anchor", help="How firmly rotations stay near the identity.")
    ] = 1e-3,
    memory_budget: Budget = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    top: Annotated[int, typer.Option("--top", "-n", min=1, help="Layers to print.")] = 20,
    json: Json = False,
) -> None:
    """Turn a full fine-tune into an OFT adapter and a LoRA adapter for what it leaves, or one.

    Reports per layer how much of the update each part explains, worst explained first.
    """
    from orthomerge.extraction.run import extract as run
    from orthomerge.recipe.sizes import parse_size

    result = run(
        model,
        base,
        kind="lora" if lora else kind,  # type: ignore[arg-type]  # the library names the legal ones
        rank=16 if rank is None and energy is None else rank,
        energy=energy,
        block_size=block_size,
        targets=targets,
        anchor=anchor,
        output=output,
        overwrite=overwrite,
        memory_budget_bytes=None if memory_budget is None else parse_size(memory_budget),
        device=device,
    )
    if json:
        return print_json(_facts(result))
    _print(result, top)


def _facts(result: ExtractResult) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "settings": dataclasses.asdict(result.settings),
        "adapters": {kind: len(tensors) for kind, (tensors, _) in result.adapters.items()},
        "totals": result.totals,
        "layers": [
            {**dataclasses.asdict(layer), "explained": layer.explained} for layer in result.layers
        ],
        "unchanged": list(result.unchanged),
        "unexplained": [dataclasses.asdict(one) for one in result.unexplained],
        "peak_working_memory_bytes": result.peak_bytes,
        "notes": list(result.notes),
    }


def _print(result: ExtractResult, top: int) -> None:
    say(" change  rotation (chance)  low rank  residual  rank  angle  layer")
    for layer in result.layers[:top]:
        say(
            f"{layer.change:7.2%}  {layer.rotation_share:8.1%} ({layer.rotation_by_chance:6.1%})"
            f"  {layer.low_rank_share:8.1%}  {layer.residual:8.3f}  {layer.rank:4d}"
            f"  {layer.largest_angle:4.1f}°  {layer.name}"
        )
    if len(result.layers) > top:
        say(f"… and {len(result.layers) - top} more (--top, --json)")
    for note in result.notes:
        say(f"note   {note}", err=True)
    if result.unchanged:
        say(f"note   {len(result.unchanged)} linear weights are unchanged and left out", err=True)
    if result.unexplained:
        names = ", ".join(one.name for one in result.unexplained[:4])
        more = ", …" if len(result.unexplained) > 4 else ""
        say(
            f"note   {len(result.unexplained)} other tensors differ, and no adapter has them: "
            f"{names}{more}",
            err=True,
        )
    say(_conclusion(result))
    say(str(result.output))


def _conclusion(result: ExtractResult) -> str:
    """Say in one line what explains the update of all layers together."""
    totals, settings = result.totals, result.settings
    parts = []
    if settings.rotates:
        chance = totals["rotation_by_chance"]
        parts.append(f"rotations explain {totals['rotation_share']:.1%} (chance {chance:.1%})")
    if settings.low_rank:
        most = max(layer.rank for layer in result.layers)
        parts.append(f"low rank (up to {most}) {totals['low_rank_share']:.1%}")
    left = f"{1 - totals['explained']:.1%} is left"
    return f"of the update of {len(result.layers)} layers, {', '.join(parts)}; {left}"
