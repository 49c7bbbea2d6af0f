"""What a tensor is in its model, from its name and shape.

Names follow the common transformer implementations; a tensor that fits nothing is told by its
shape. Which of them a method rotates is the method's own business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

__all__ = ["Role", "tensor_role"]

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


assert set(get_args(Role)) == {"linear", "embedding", "convolution", "stack", "other"}
