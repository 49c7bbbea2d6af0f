"""Bring the same rotated module of several adapters to one shape: common blocks, common sharing.

Headers only; the numbers follow in ``executors.rotation``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orthomerge.adapters.convention import Kind
from orthomerge.adapters.export import MergedModule
from orthomerge.adapters.rotated import OftModule, RotationAdapter, Side
from orthomerge.errors import AdapterError, OrthoMergeError
from orthomerge.linalg.triangular import packed_width

__all__ = ["JoinedModule", "join_module", "joined_modules"]


@dataclass(frozen=True, slots=True)
class JoinedModule:
    """One rotated module of the output.

    Args:
        name: Module path.
        kind: Linear (or convolution), or embedding.
        num_blocks: Blocks to store; 1 if shared.
        block_size: Common block size: the adapters' least common multiple.
        shared: Every adapter that rotates it shares one block.
        side: Side of the weight that the rotation acts on.
        scaled: Whether an adapter also scales the output features.
        parts: The module in each adapter; None where it is not rotated.
    """

    name: str
    kind: Kind
    num_blocks: int
    block_size: int
    shared: bool
    side: Side
    scaled: bool
    parts: tuple[OftModule | None, ...]

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the stored tensor."""
        return self.num_blocks, packed_width(self.block_size)

    @property
    def stored(self) -> MergedModule:
        """What the adapter's config has to describe.

        The width of a shared block's module is unknown without the base; one block is as good as
        any, because only the block size is stored then.
        """
        width = self.num_blocks * self.block_size
        return MergedModule(width, self.block_size, self.kind, self.shared)


def joined_modules(
    adapters: Sequence[RotationAdapter], problems: list[OrthoMergeError]
) -> dict[str, JoinedModule]:
    """Match the adapters' modules by name and settle their common block size."""
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    merged = {}
    for name in names:
        parts = tuple(adapter.modules.get(name) for adapter in adapters)
        try:
            merged[name] = join_module(name, parts)
        except AdapterError as error:
            problems.append(error)
    return merged


def join_module(name: str, parts: tuple[OftModule | None, ...]) -> JoinedModule:
    """Settle how one module is stored after the merge.

    Args:
        name: Module path.
        parts: The module in each adapter; None where it is not rotated.

    Raises:
        AdapterError: The adapters disagree about its kind, side or size.
    """
    present = [part for part in parts if part is not None]
    if len({part.side for part in present}) > 1:
        raise AdapterError(
            "some adapters rotate its inputs, others (OFT of PEFT before 0.14) its outputs",
            tensor=name,
            found=", ".join(f"{part.layout} ({part.side} side)" for part in present),
            remedy="Use --method orthomerge-decoupled with --base.",
        )
    size = math.lcm(*(part.block_size for part in present))
    shared = all(part.shared for part in present)
    widths = {part.num_blocks * part.block_size for part in present if not part.shared}
    rows = {part.rows for part in present if part.rows is not None}
    if len({part.kind for part in present}) > 1 or len(widths) > 1 or len(rows) > 1:
        raise AdapterError(
            "the adapters disagree about this module",
            tensor=name,
            found=", ".join(f"{part.kind} {part.num_blocks}x{part.block_size}" for part in present),
            remedy="Merge adapters that were trained on one base model.",
        )
    width = next(iter(widths), size)
    if width % size:
        raise AdapterError(
            "the adapters' block sizes have no common multiple that divides its width",
            tensor=name,
            expected=f"a divisor of {width}",
            found=f"{size}",
            remedy="Merge adapters of one block size.",
        )
    blocks = 1 if shared else width // size
    scaled = any(part.scale_key is not None for part in present)
    side = present[0].side
    return JoinedModule(name, present[0].kind, blocks, size, shared, side, scaled, parts)
