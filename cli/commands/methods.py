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
        return print_json({"methods": [_facts(method) for method in methods.values()]})
    width = max(map(len, methods))
    for name, method in methods.items():
        say(f"{name:<{width}}  {_needs(method):<22} {method.summary}")


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
        sign = "any sign" if method.negative_weights else "not negative"
        say(f"weights     one per model (--weight), {sign}, default 1")
    most = "" if method.max_models is None else f", at most {method.max_models}"
    if method.min_models > 1 or most:
        say(f"models      at least {method.min_models}{most}")
    if method.dense:
        say(f"otherwise   {method.dense}, where the models are not all OFT-like adapters")
    if method.parameters:
        say("parameters  (--set NAME=VALUE)")
    for parameter in method.parameters.values():
        say(f"  {parameter.name:<12} {parameter.allowed}, default {parameter.default}")
        say(f"  {'':<12} {parameter.help}")


def _needs(method: MergeMethod) -> str:
    return {
        "weight": "full models",
        "delta": "anything + base",
        "rotation": "OFT adapters [+ base]",
        "factors": "LoRA adapters",
    }[method.space.value]


def _facts(method: MergeMethod) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "space": method.space.value,
        "needs_base": method.needs_base,
        "uses_weights": method.uses_weights,
        "negative_weights": method.negative_weights,
        "otherwise": method.dense,
        "min_models": method.min_models,
        "max_models": method.max_models,
        "reference": method.reference,
        "laws": sorted(method.laws),
        "parameters": [
            {"name": p.name, "allowed": p.allowed, "default": p.default, "help": p.help}
            for p in method.parameters.values()
        ],
    }
