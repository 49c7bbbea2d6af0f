"""Which parameters are protected, what they are called, and which share coefficients.

A parameter's local part is all that this process holds of it; nothing here computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orthomerge.errors import RecipeError

__all__ = ["Scope", "find_scope", "local"]

Granularity = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Scope:
    """The trained parameters, split into protected ones and the rest.

    Attributes:
        names: Names of the protected parameters, in the model's order.
        parameters: The protected parameters; tied ones once.
        outside: Trained parameters that no constraint covers.
        groups: Group of every protected parameter, [tensors].
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    outside: tuple[nn.Parameter, ...]
    groups: torch.Tensor

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """All of them: whose gradients a retain backward pass may touch."""
        return (*self.parameters, *self.outside)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds, without its history of gradients.

    >>> local(torch.ones(2, requires_grad=True)).requires_grad
    False
    """
    shard: Any = getattr(tensor, "to_local", None)
    own: torch.Tensor = tensor.detach() if shard is None else tensor.detach().to_local()  # type: ignore[attr-defined]
    return own


def find_scope(
    source: nn.Module | Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
    pattern: str | None = None,
    granularity: Granularity = "per-tensor",
) -> Scope:
    """Return which of a model's trained parameters are protected.

    Args:
        source: A module, named parameters, or parameters (named by their place).
        pattern: Regular expression that some part of a protected parameter's name matches; all
            that are trained if None.
        granularity: ``"per-tensor"``, ``"global"``, ``"per-layer"`` (the first number in a name
            counts; names without one are groups of their own), or regular expressions, whose
            matches form one group each, in order; the rest is the last group.

    Raises:
        RecipeError: Nothing is trained, or nothing matches.
    """
    trained = _trained(source)
    chosen = {n: p for n, p in trained.items() if pattern is None or re.search(pattern, n)}
    if not chosen:
        raise RecipeError(
            "no parameter to protect",
            expected=f"a trained parameter matching {pattern!r}" if pattern else "requires_grad",
            found=", ".join(list(trained)[:5]) or "no trained parameter",
            remedy="Check the scope against the model's parameter names.",
        )
    outside = tuple(p for n, p in trained.items() if n not in chosen)
    names = tuple(chosen)
    return Scope(names, tuple(chosen.values()), outside, _groups(names, granularity))


def _trained(
    source: nn.Module | Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
) -> dict[str, nn.Parameter]:
    """Return every trained parameter once, by its first name."""
    if isinstance(source, nn.Module):
        named: Iterable[tuple[str, nn.Parameter]] = source.named_parameters()
    elif isinstance(source, Mapping):
        named = source.items()
    else:
        named = ((str(index), parameter) for index, parameter in enumerate(source))
    seen: set[int] = set()
    found = {}
    for name, parameter in named:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


def _groups(names: Sequence[str], granularity: Granularity) -> torch.Tensor:
    if granularity == "per-tensor":
        return torch.arange(len(names))
    if granularity == "global":
        return torch.zeros(len(names), dtype=torch.long)
    if granularity == "per-layer":
        keys = [
            number[0] if (number := re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)) else name
            for name in names
        ]
    else:
        patterns = list(granularity)
        keys = [next((p for p in patterns if re.search(p, name)), "") for name in names]
    order = list(dict.fromkeys(keys))
    return torch.tensor([order.index(key) for key in keys])
