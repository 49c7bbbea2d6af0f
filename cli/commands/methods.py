"""``orthomerge methods``: how to merge and to unlearn, from the methods' own signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from orthomerge_cli.options import Json
from orthomerge_cli.session import print_json, say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orthomerge.merging.registry import MergeMethod
    from orthomerge.parameters import Parameter
    from orthomerge.unlearning.objectives import ObjectiveInfo

app = typer.Typer(
    help="List merge methods and unlearning objectives, and show their parameters.",
    no_args_is_help=True,
)


@app.command("list")
def list_methods(json: Json = False) -> None:
    """List all merge methods and unlearning objectives, installed plug-ins included."""
    from orthomerge.merging.registry import all_methods
    from orthomerge.unlearning.objectives import all_objectives

    methods, objectives = all_methods(), all_objectives()
    if json:
        facts = [_facts(method) for method in methods.values()]
        found = [_objective_facts(info) for info in objectives.values()]
        return print_json({"methods": facts, "objectives": found})
    width = max(map(len, [*methods, *objectives]))
    for name, method in methods.items():
        say(f"{name:<{width}}  {_needs(method):<22} {method.summary}")
    for name, info in objectives.items():
        say(f"{name:<{width}}  {'unlearning objective':<22} {info.summary}")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Method id.")],
    json: Json = False,
) -> None:
    """Show one method: formula, parameters with ranges and defaults, reference."""
    from orthomerge.errors import UnknownNameError
    from orthomerge.merging.registry import get_method
    from orthomerge.unlearning.objectives import get_objective

    try:
        method = get_method(name)
    except UnknownNameError as no_method:
        try:
            return _show_objective(get_objective(name), as_json=json)
        except UnknownNameError as neither:
            known = {*no_method.known, *neither.known}
            raise UnknownNameError("method or objective", name, known) from None
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
    _say_parameters(method.parameters)


def _show_objective(info: ObjectiveInfo, *, as_json: bool) -> None:
    if as_json:
        return print_json(_objective_facts(info))
    say(f"{info.name}: {info.description.split('Args:')[0].strip()}\n")
    say(f"works on    unlearning: γ {info.forget_weight:g}, α {info.retain_weight:g}, "
        f"retain loss {info.retain}")  # fmt: skip
    say(f"reference   {info.reference}")
    for need in sorted(info.needs, key=lambda need: need.value):
        say(f"needs       {need.value}")
    _say_parameters(info.parameters)


def _say_parameters(parameters: Mapping[str, Parameter]) -> None:
    if parameters:
        say("parameters  (--set NAME=VALUE)")
    for parameter in parameters.values():
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
        "parameters": _parameter_facts(method.parameters),
    }


def _objective_facts(info: ObjectiveInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "summary": info.summary,
        "forget_weight": info.forget_weight,
        "retain_weight": info.retain_weight,
        "retain": info.retain,
        "averages": info.averages,
        "needs": sorted(need.value for need in info.needs),
        "reference": info.reference,
        "parameters": _parameter_facts(info.parameters),
    }


def _parameter_facts(parameters: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    return [
        {"name": p.name, "allowed": p.allowed, "default": p.default, "help": p.help}
        for p in parameters.values()
    ]
