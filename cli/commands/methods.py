"""``orthomerge methods``: what can be merged how, from the methods' own signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say

if TYPE_CHECKING:
    from orthomerge.merging.registry import MergeMethod

app = typer.Typer(help="List merge methods and show their parameters.", no_args_is_help=True)


@app.command("list")
def list_methods(json: Json = False) -> None:
    """List all merge methods, installed plug-ins included."""
    from orthomerge.merging.registry import all_methods

    methods = all_methods()
    if json:
        return print_json([_facts(method) for method in methods.values()])
    width = max(map(len, methods))
    for name, method in methods.items():
        say(f"{name:<{width}}  {_needs(method):<18} {method.summary}")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Method id.")],
    json: Json = False,
) -> None:
    """Show one method: formula, parameters with ranges and defaults, reference."""
    from orthomerge.merging.registry import get_method

    method = get_method(name)
    if json:
        return print_json(_facts(method))
    say(f"{name}: {method.description.split('Args:')[0].strip()}\n")
    say(f"works on    {_needs(method)}")
    say(f"reference   {method.reference}")
    if method.uses_weights:
        say("weights     one per model (--weight), default 1")
    if method.parameters:
        say("parameters  (--set NAME=VALUE)")
    for parameter in method.parameters.values():
        say(f"  {parameter.name:<12} {parameter.allowed}, default {parameter.default}")
        say(f"  {'':<12} {parameter.help}")


def _needs(method: MergeMethod) -> str:
    return {
        "weight": "full models",
        "delta": "full models + base",
        "rotation": "OFT adapters",
    }[method.space.value]


def _facts(method: MergeMethod) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "space": method.space.value,
        "needs_base": method.needs_base,
        "uses_weights": method.uses_weights,
        "min_models": method.min_models,
        "max_models": method.max_models,
        "reference": method.reference,
        "laws": sorted(method.laws),
        "parameters": [
            {"name": p.name, "allowed": p.allowed, "default": p.default, "help": p.help}
            for p in method.parameters.values()
        ],
    }
