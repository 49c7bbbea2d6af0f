"""What a tensor is in its model, from its name and shape: what may be rotated, what must not.

Names follow the common transformer implementations; a tensor that fits nothing is told by its
shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

__all__ = ["Role", "rotated_roles", "tensor_role", "unfit_block"]

Role = Literal["linear", "embedding", "convolution", "stack", "other"]

_EMBEDDING = re.compile(
    r"(?:^|[._])(?:\w*embed\w*|wte|wpe|shared|lm_head|embed_out|output_projection)(?:\.|$)"
)
_NORM = re.compile(r"(?:norm|(?:^|[._])ln_?\w*)(?:\.|$)", re.IGNORECASE)
_EXPERTS = re.compile(r"(?:^|\.)experts?(?:\.|$)")


def tensor_role(name: str, shape: Sequence[int]) -> Role:
    """Return the part a tensor plays.

    ``linear``: a matrix [out, in]; ``embedding``: a matrix whose rows are tokens or positions, or
    an output head; ``convolution``: a kernel [out, in, ...]; ``stack``: matrices of several experts
    [experts, out, in]; ``other``: everything else (biases, norms, scalars).

    >>> tensor_role("model.layers.0.mlp.up_proj.weight", (11, 4))
    'linear'
    >>> tensor_role("model.embed_tokens.weight", (100, 4))
    'embedding'
    """
    if len(shape) < 2 or 0 in shape or _NORM.search(name):
        return "other"
    if len(shape) == 2:
        if not name.endswith("weight") and "." in name and name.rpartition(".")[2] == "bias":
            return "other"
        return "embedding" if _EMBEDDING.search(name) else "linear"
    if len(shape) == 3 and _EXPERTS.search(name):
        return "stack"
    return "convolution"


def rotated_roles(*, include_embeddings: bool, rotate_conv: bool) -> frozenset[Role]:
    """Return the roles whose input side a method rotates."""
    roles: set[Role] = {"linear", "stack"}
    roles |= {"embedding"} if include_embeddings else set()
    roles |= {"convolution"} if rotate_conv else set()
    return frozenset(roles)


def unfit_block(shape: tuple[int, ...], role: str, parameters: Mapping[str, Any]) -> str | None:
    """Return why a tensor cannot be rotated in blocks of the size asked for, or None."""
    block = parameters["block"]
    wanted = {key: parameters[key] for key in ("include_embeddings", "rotate_conv")}
    if not block or role not in rotated_roles(**wanted):
        return None
    columns = shape[-1] if role == "stack" else math.prod(shape[1:])
    return f"block: {block} does not divide its {columns} inputs" if columns % block else None


assert set(get_args(Role)) == {"linear", "embedding", "convolution", "stack", "other"}
