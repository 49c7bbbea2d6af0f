"""Write a commented recipe from an objective's registration, so that it cannot drift from it."""

from __future__ import annotations

import textwrap
from pathlib import Path

from pydantic import BaseModel

from orthomerge.recipe.template import parameter_lines, written
from orthomerge.recipe.unlearning_schema import UnlearnRecipe
from orthomerge.unlearning.objectives import ObjectiveInfo

__all__ = ["unlearning_template"]

_PATHS = {
    "model": "models/tuned",
    "forget": "data/forget.jsonl",
    "retain": "data/retain.jsonl",
    "holdout": "data/holdout.jsonl",
    "output": "unlearned",
}
_SECTIONS = ("adapter", "data", "train", "stop")
#: What a required parameter stands at until it is edited; its comment says what to put there.
_PLACEHOLDER = 1.0


def unlearning_template(info: ObjectiveInfo, path: Path) -> str:
    """Return a recipe for an objective with every setting at its default, explained.

    Args:
        info: The objective.
        path: Where the recipe will lie, for the commands in its header.
    """
    example = next(iter(info.parameters), None)
    change = f"{example}={written(_default(info, example))}" if example else "train.max_steps=50"
    lines = [
        f"# {info.summary}",
        f"# Reference: {info.reference}",
        "#",
        f"# Check:  orthomerge unlearn {path} --dry-run",
        f"# Run:    orthomerge unlearn {path}",
        f"# Change: orthomerge unlearn {path} --set {change}",
    ]
    for name, value in _PATHS.items():
        lines += [*_comment(_described(UnlearnRecipe, name), ""), f"{name}: {value}"]
    lines += ["", f"objective: {info.name}", *_parameters(info), *_loss(info)]
    lines += [*_comment(_described(UnlearnRecipe, "projection"), ""), "projection: gu"]
    for section in _SECTIONS:
        lines += ["", f"{section}:", *_section(section)]
    return "\n".join([*lines, "", "seed: 0", ""])


def _default(info: ObjectiveInfo, name: str) -> object:
    return _PLACEHOLDER if name in info.required else info.parameters[name].default


def _parameters(info: ObjectiveInfo) -> list[str]:
    if not info.parameters:
        return []
    lines = ["parameters:"]
    for name, parameter in info.parameters.items():
        *comment, _ = parameter_lines(parameter)
        lines += [*comment, f"  {name}: {written(_default(info, name))}"]
    return lines


def _loss(info: ObjectiveInfo) -> list[str]:
    return [
        "loss: # γ L_forget + α L_retain; tune α before anything else",
        f"  forget_weight: {written(info.forget_weight)}",
        f"  retain_weight: {written(info.retain_weight)}",
        f"  retain_loss: {info.retain}",
        "",
    ]


def _section(name: str) -> list[str]:
    grammar = UnlearnRecipe.model_fields[name].annotation
    assert isinstance(grammar, type)
    assert issubclass(grammar, BaseModel)
    lines = []
    for key, value in grammar().model_dump().items():
        comment = _comment(_described(grammar, key), "  ")
        lines += [*comment, f"  {key}: {written(value) if value != {} else '{}'}"]
    return lines


def _described(grammar: type[BaseModel], key: str) -> str:
    return grammar.model_fields[key].description or ""


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 92, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
