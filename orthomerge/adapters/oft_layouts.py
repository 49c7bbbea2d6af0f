"""The OFT layouts before PEFT 0.16: full blocks instead of packed ones, with their own rules.

Two of them share the names: ``oft_r`` with a scale ``oft_s`` beside it (0.14 and 0.15, rotates
input features), and ``oft_r`` alone (0.7 to 0.13, rotates output features).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.contents import malformed
from orthomerge.adapters.rotated import Layout, OftModule, read_finite
from orthomerge.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from orthomerge.adapters.rotated import TensorSource
    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["OLD_PARAMETERS", "full_module", "full_skew"]

OLD_PARAMETERS = ("oft_r", "oft_s")


def full_module(
    name: str, infos: Mapping[str, TensorInfo], config: AdapterConfig, origin: str
) -> OftModule:
    """Recognise a module stored as full blocks, from its headers.

    Raises:
        AdapterError: A tensor is missing or has no possible shape.
    """
    first = next(iter(infos.values()))
    if "oft_r" not in infos:
        raise malformed(origin, first, "scales a module that is not rotated", "oft_r", "oft_s")
    rotation, scale = infos["oft_r"], infos.get("oft_s")
    shape = rotation.shape
    if len(shape) != 3 or shape[0] < 1 or shape[1] != shape[2] or shape[1] < 1:
        raise malformed(origin, rotation, "is not a list of square blocks", "[r, b, b]", shape)
    shared = config.value("block_share", bool, False)
    if shared and shape[0] != 1:
        raise malformed(
            origin, rotation, "has several blocks although block_share is set", 1, shape[0]
        )
    if scale is None and "oft_block_size" in config.values:
        raise malformed(
            origin, rotation, "has no scale, which PEFT 0.14 and 0.15 save", "oft_s", "oft_r alone"
        )
    if scale is not None and (len(scale.shape) != 2 or 1 not in scale.shape):
        raise malformed(origin, scale, "is not one scale per output feature", "[o, 1]", scale.shape)
    layout: Layout = "left" if scale is None else "full"
    return OftModule(
        name,
        rotation.name,
        "linear",
        shape[0],
        shape[1],
        shared,
        rotation.dtype,
        layout,
        None if scale is None else scale.name,
        None if scale is None else scale.numel,
    )


def full_skew(
    module: OftModule, source: TensorSource, config: AdapterConfig, dtype: torch.dtype
) -> torch.Tensor:
    """Read a module's canonical skew blocks, ``A = (P - P^T) / 2`` of the stored P [nb, b, b].

    K = (I - A)(I + A)^{-1}; the weight becomes W0 K^T or, on the left, K^T W0, and
    K^T = Cayley(A). With ``coft`` P is projected first, as PEFT does before every use.

    Raises:
        AdapterError: The radius of ``coft`` depends on a width that the adapter does not tell.
        NumericalError: The tensor is not finite.
    """
    from orthomerge.linalg import frobenius

    P = read_finite(source, module.key, dtype)
    if config.value("coft", bool, False):
        radius = config.value("eps", float, 6e-5) * _eps_factor(module, source.origin) ** 2
        radius /= module.num_blocks**0.5
        norms = frobenius(P)
        P = P * (radius / norms).where(norms > radius, 1.0)[:, None, None].to(dtype)
    return (P - P.mT) / 2


def _eps_factor(module: OftModule, origin: str) -> int:
    """Return ceil(o / r), by whose square these versions multiply the config's eps."""
    if module.layout == "left":
        return module.block_size
    if module.shared:
        raise AdapterError(
            "coft together with block_share cannot be read from this layout",
            file=origin,
            tensor=module.key,
            remedy="Merge it into its base with PEFT 0.15, and merge the full models.",
        )
    return math.ceil((module.rows or 0) / module.num_blocks)
