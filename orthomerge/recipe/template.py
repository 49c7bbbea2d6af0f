"""Write a commented recipe from a method's registration, so that it cannot drift from it."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from orthomerge.merging.registry import MergeMethod
from orthomerge.merging.spaces import Space
from orthomerge.parameters import Parameter

__all__ = ["parameter_lines", "recipe_template", "written"]

_FOLDERS = {
    Space.WEIGHT: ("models/first", "models/second"),
    Space.DELTA: ("models/first", "models/second"),
    Space.ROTATION: ("adapters/first", "adapters/second"),
    Space.FACTORS: ("loras/first", "loras/second"),
}


def recipe_template(method: MergeMethod, path: Path) -> str:
    """Return a recipe for ``method`` with every parameter at its default, explained.

    Args:
        method: The method.
        path: Where the recipe will lie, for the commands in its header.
    """
    lines = [f"# {method.summary}", f"# Reference: {method.reference}", "#"]
    lines += [f"# Check:  orthomerge plan --recipe {path}"]
    lines += [f"# Run:    orthomerge merge --recipe {path}"]
    example = next(iter(method.parameters), None)
    if example:
        value = written(method.parameters[example].default)
        lines += [f"# Change: orthomerge merge --recipe {path} --set {example}={value}"]
    lines += [f"method: {method.name}", "", *_models(method)]
    if method.parameters:
        lines += ["", "# A value may also be a gradient over the layers ([first, ..., last]) or a"]
        lines += ["# list of rules: [{match: '*.mlp.*', value: ...}, {value: ...}]."]
        lines += ["parameters:"]
        for parameter in method.parameters.values():
            lines += parameter_lines(parameter)
    lines += ["", "output:", "  path: merged", "  max_shard_size: 5GB", ""]
    return "\n".join(lines)


def _models(method: MergeMethod) -> list[str]:
    base = ["# The model they were fine-tuned from.", "base: models/base", ""]
    optional = [
        "# With a base the output is a full checkpoint, without an adapter.",
        "# base: models/base",
        "",
    ]
    count = 1 if method.max_models == 1 else 2
    entries = []
    for folder in _FOLDERS[method.space][:count]:
        entries.append(f"  - path: {folder}")
        if method.uses_weights:
            entries.append("    weight: 1.0")
    head = (
        base
        if method.needs_base
        else optional
        if method.space in (Space.ROTATION, Space.FACTORS)
        else []
    )
    return [*head, "models:", *entries]


def parameter_lines(parameter: Parameter) -> list[str]:
    """Return a parameter at its default, under a comment that says what it does."""
    comment = f"{parameter.help} ({parameter.allowed})"
    wrapped = textwrap.wrap(comment, 90, initial_indent="  # ", subsequent_indent="  # ")
    return [*wrapped, f"  {parameter.name}: {written(parameter.default)}"]


def written(value: Any) -> str:
    """Return a default in YAML's spelling."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return str(value)
