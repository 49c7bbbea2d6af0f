"""Which tensors a method rotates, by the part they play in their model.

The parts themselves are told in ``checkpoints.roles``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orthomerge.checkpoints.roles import Role, tensor_role

__all__ = ["Role", "rotated_roles", "tensor_role", "unfit_block"]


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
    if columns % block == 0:
        return None
    return (
        f"block: {block} does not divide its {columns} inputs; give such tensors block 0 by a rule"
    )
