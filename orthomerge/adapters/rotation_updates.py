"""What an adapter that rotates does to base weights: the change of each, exact in fp32 or fp64.

Shapes are checked against the base's headers before a tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthomerge.adapters.effective import (
    apply_left_rotation,
    apply_rotation,
    left_blocks_fit,
)
from orthomerge.adapters.keys import base_weight_name
from orthomerge.adapters.rotated import OftModule, RotationAdapter
from orthomerge.errors import AdapterError, OrthoMergeError

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["RotationUpdate", "rotation_misfit", "rotation_updates"]

_REMEDY = "Give the base model that the adapter was trained on."


@dataclass(frozen=True)
class RotationUpdate:
    """The change of one weight by an OFT, BOFT or HRA adapter.

    Attributes:
        adapter: The adapter.
        module: The module in it.
    """

    adapter: RotationAdapter
    module: OftModule

    @property
    def kind(self) -> str:
        """Kind of the adapter: "oft", "boft" or "hra"."""
        return self.adapter.config.peft_type.lower()

    @property
    def keys(self) -> tuple[str, ...]:
        """Tensors of the adapter it reads."""
        return self.module.keys

    @property
    def read_bytes(self) -> int:
        """Their size."""
        return sum(self.adapter.source.tensors[key].nbytes for key in self.keys)

    @property
    def needs_base(self) -> bool:
        """Whether the base weight itself must be given: always."""
        return True

    def delta(
        self, W0: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the change of the base weight, ``diag(s) W0 R - W0`` (``L W0 - W0`` on the left).

        R is the map the adapter was trained through, for a Cayley-Neumann series the series.

        Args:
            W0: The base weight in ``dtype``.
            shape: Its shape.
            dtype: Dtype to compute in, float32 or float64.

        Raises:
            AdapterError: There is no W0, or the rotation does not fit it.
            NumericalError: The adapter is not finite.
        """
        name = self.module.name
        if W0 is None:
            raise AdapterError(
                "a rotation cannot be applied without the base weight",
                file=self.adapter.origin,
                tensor=name,
                remedy="Pass --base.",
            )
        R = self.adapter.blocks(name, dtype).to(W0.device)
        apply = apply_left_rotation if self.module.side == "left" else apply_rotation
        W = apply(W0.reshape(shape), R, shared=self.module.shared, name=name)
        s = self.adapter.scale(name, dtype)
        if s is not None:
            W = W * s.to(W0.device).reshape(-1, *[1] * (W.ndim - 1))
        return W - W0


def rotation_updates(
    adapter: RotationAdapter, base: Mapping[str, TensorInfo], problems: list[OrthoMergeError]
) -> list[tuple[str, RotationUpdate]]:
    """Return the changes with the names of the base tensors they belong to.

    Args:
        adapter: The adapter.
        base: Headers of the base.
        problems: What is wrong is added here.
    """
    found = []
    for module in adapter.modules.values():
        try:
            name = base_weight_name(module.name, base)
        except AdapterError as error:
            problems.append(error.at(adapter.origin))
            continue
        problem = rotation_misfit(module, base[name], adapter.origin)
        problems += [problem] if problem else []
        found.append((name, RotationUpdate(adapter, module)))
    return found


def rotation_misfit(
    module: OftModule, info: TensorInfo, origin: str | None = None
) -> AdapterError | None:
    """Return why a module's rotation does not fit a weight, from the headers."""
    rows = info.shape[0] if len(info.shape) > 1 else 0
    columns = math.prod(info.shape[1:]) if rows else 0
    width = module.num_blocks * module.block_size
    if module.side == "left":
        fits = left_blocks_fit(rows, module.num_blocks, module.block_size, shared=module.shared)
        expected = f"ceil(rows / {module.num_blocks}) = {module.block_size}"
    else:
        fits = columns > 0 and (columns % width == 0 if module.shared else columns == width)
        expected = f"{width} columns"
    if fits and module.rows in (None, rows):
        return None
    scaled = "" if module.rows is None else f" and {module.rows} rows"
    return AdapterError(
        "the adapter's rotation does not fit this weight of the base",
        file=origin,
        tensor=info.name,
        expected=f"{expected}{scaled}",
        found=list(info.shape),
        remedy=_REMEDY,
    )
