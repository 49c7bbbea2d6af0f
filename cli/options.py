"""Options that several commands share, and how they become one recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from orthomerge_cli.session import SESSION

if TYPE_CHECKING:
    from orthomerge.recipe.schema import MergeRecipe

__all__ = [
    "BackMap",
    "Base",
    "Budget",
    "ComputeDtype",
    "Device",
    "Dtype",
    "Json",
    "Method",
    "Missing",
    "Models",
    "NoProvenance",
    "NormMatched",
    "Output",
    "Recipe",
    "Set",
    "ShardSize",
    "Weights",
    "Workers",
    "gather_recipe",
    "with_options",
]


def _json(value: bool) -> bool:
    SESSION.json = value
    return value


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object.", callback=_json, is_eager=True)
]
Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL]...", help="Files, folders or hf:org/name to merge."),
]
Recipe = Annotated[Path | None, typer.Option("--recipe", "-r", help="YAML recipe to start from.")]
Base = Annotated[str | None, typer.Option("--base", help="Model they were fine-tuned from.")]
Method = Annotated[
    str | None, typer.Option("--method", "-m", help="Method id; default: what the models suggest.")
]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", "-w", help="Weight of each model, in order.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Method parameter, or a recipe's dotted key."),
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", help="Folder, or file ending in .safetensors."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Output dtype, e.g. bfloat16.")]
ComputeDtype = Annotated[
    str | None, typer.Option("--compute-dtype", help="float32 or float64 arithmetic.")
]
ShardSize = Annotated[
    str | None, typer.Option("--max-shard-size", help="Largest output file, e.g. 5GB.")
]
Missing = Annotated[
    str | None,
    typer.Option("--missing", help="Tensors not in every model: error, copy-base or skip."),
]
Form = Annotated[
    str | None, typer.Option("--as", help="What LoRA adapters become: lora, dora or full.")
]
Rank = Annotated[
    str | None,
    typer.Option("--rank", help="Of a merged LoRA: a number, energy:0.99 or parameters:1000000."),
]
Style = Annotated[
    str | None, typer.Option("--style", help="Format of a merged LoRA: peft, kohya or diffusers.")
]
Absent = Annotated[
    str | None,
    typer.Option("--absent", help="Modules not in every LoRA adapter: zero, skip or error."),
]
Heads = Annotated[
    str | None,
    typer.Option("--heads", help="Trained heads of several adapters: average, error or keep:N."),
]
SameBase = Annotated[
    bool | None,
    typer.Option("--assume-same-base", help="Merge adapters that name different base models."),
]
NormMatched = Annotated[
    float | None,
    typer.Option("--norm-matched", help="Size of the update / size of the sum of all changes."),
]
BackMap = Annotated[str | None, typer.Option("--back-map", help="OFT: auto, as_trained or exact.")]
Budget = Annotated[str | None, typer.Option("--memory-budget", help="Working memory, e.g. 8GB.")]
Workers = Annotated[int | None, typer.Option("--workers", help="Threads; default: one per core.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N.")]
NoProvenance = Annotated[
    bool, typer.Option("--no-provenance", help="Do not record how the output was made.")
]


def gather_recipe(
    models: list[str] | None,
    recipe: Path | None,
    weights: list[float] | None,
    settings: list[str] | None,
    *,
    no_provenance: bool = False,
    **options: Any,
) -> MergeRecipe:
    """Combine a recipe file and command-line options into one checked recipe.

    Options win over the file; ``--set`` wins over both. Option names are dotted recipe keys with
    ``__`` for the dot.
    """
    from orthomerge.recipe.loader import recipe_from_data
    from orthomerge.recipe.yaml_positions import Document, load_recipe_file

    if recipe is None and not models:
        raise typer.BadParameter("Give models to merge, or --recipe FILE.")
    document = Document({}, "command line")
    if recipe:
        document = load_recipe_file(recipe, keys="key models")
    data = dict(document.data)
    if models:
        data["models"] = [{"path": model} for model in models]
    if weights:
        entries = [e if isinstance(e, dict) else {"path": e} for e in data.get("models") or []]
        if len(entries) != len(weights):
            raise typer.BadParameter(
                f"{len(weights)} --weight for {len(entries)} models: give one per model, in order."
            )
        data["models"] = [{**e, "weight": w} for e, w in zip(entries, weights, strict=True)]
    if no_provenance:
        options["output__provenance"] = False
    document.data = with_options(data, options)
    return recipe_from_data(document, settings or [])


def with_options(data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's data with the options that were given, by dotted keys with ``__``."""
    result = dict(data)
    for name, value in options.items():
        if value is not None:
            *parents, key = name.split("__")
            target = result
            for parent in parents:
                target[parent] = dict(target.get(parent) or {})
                target = target[parent]
            target[key] = value
    return result
