"""BOFT adapters: a rotation as a product of block-diagonal ones between butterfly permutations.

The product is formed densely; its factors do not merge factor by factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.contents import build_modules, malformed, read_contents
from orthomerge.adapters.convention import EXACT
from orthomerge.adapters.effective import BackMap
from orthomerge.adapters.rotated import OftModule, RotationAdapter, TensorSource, read_finite

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["BoftAdapter", "butterfly_order"]

_PARAMETERS = ("boft_R", "boft_s")


def butterfly_order(size: int, block: int, level: int) -> list[int]:
    """Return the permutation that stands before and after the blocks of one butterfly level.

    Half-blocks of ``block / 2`` entries are grouped by ``2^(level + 1)``; inside a group the even
    ones come first, then the odd ones, so that level 0 is the identity and level i pairs features
    that are ``2^i`` half-blocks apart.

    Args:
        size: Features n.
        block: Block size b, even.
        level: Index of the factor, from 0.

    >>> butterfly_order(8, 2, 2)
    [0, 2, 4, 6, 1, 3, 5, 7]
    """
    half, group = block // 2, 2 ** (level + 1)
    order = [*range(0, group, 2), *range(1, group, 2)]
    return [
        start + unit * half + entry
        for start in range(0, size, group * half)
        for unit in order
        for entry in range(half)
    ]


@dataclass(frozen=True)
class BoftAdapter(RotationAdapter):
    """A BOFT adapter, ``W_eff = diag(s) W0 K^T`` with ``K = B_m ... B_1 B_0``.

    ``B_i = P_i blockdiag(C_i) P_i^T``, ``C = (I - S)(I + S)^{-1}`` and ``S`` the skew part of the
    stored block. In ``modules`` the rotation is one dense block.

    References:
        BOFT, arXiv:2311.06243.
    """

    @classmethod
    def from_checkpoint(cls, checkpoint: TensorSource, config: AdapterConfig) -> BoftAdapter:
        """Recognise a BOFT adapter from its headers.

        Raises:
            AdapterError: It is malformed.
            ProblemsError: In several ways.
        """
        origin = checkpoint.origin
        contents = read_contents(checkpoint.tensors, origin, _PARAMETERS, "BOFT")
        modules = build_modules(
            contents, lambda name, infos: _module(name, infos, origin), origin, "BOFT"
        )
        return cls(
            origin, config, EXACT, modules, contents.others, contents.base_copies, checkpoint
        )

    @property
    def description(self) -> str:
        """What it is, in words."""
        counts = {self.source.tensors[one.key].shape[0] for one in self.modules.values()}
        return f"BOFT adapter ({max(counts)} butterfly factor(s))"

    def blocks(
        self, module_name: str, dtype: torch.dtype, back_map: BackMap = "as_trained"
    ) -> torch.Tensor:
        """Return the dense rotation R = K^T as one block [1, n, n]."""
        import torch

        from orthomerge.linalg import cayley, regroup_blocks

        P = read_finite(self.source, self.modules[module_name].key, dtype)
        factors = cayley((P - P.mT) / 2)  # C_i^T
        levels, blocks, size, _ = P.shape
        R = torch.eye(blocks * size, dtype=dtype, device=P.device)
        for level in range(levels):
            B = regroup_blocks(factors[level], blocks * size)[0]
            if levels > 1:
                order = torch.tensor(butterfly_order(blocks * size, size, level), device=P.device)
                B = B[order][:, order]
            R = R @ B
        return R[None]

    def skew(self, module_name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense generator [1, n, n]; see ``RotationAdapter.skew``."""
        from orthomerge.linalg import inverse_cayley

        return inverse_cayley(self.blocks(module_name, dtype))


def _module(name: str, infos: Mapping[str, TensorInfo], origin: str) -> OftModule:
    first = next(iter(infos.values()))
    if len(infos) < len(_PARAMETERS):
        raise malformed(
            origin,
            first,
            "a BOFT module is incomplete",
            " and ".join(_PARAMETERS),
            ", ".join(infos),
        )
    R, s = infos["boft_R"], infos["boft_s"]
    if len(R.shape) != 4 or R.shape[2] != R.shape[3] or 0 in R.shape:
        raise malformed(origin, R, "is not lists of square blocks", "[m, nb, b, b]", list(R.shape))
    levels, blocks, size, _ = R.shape
    if levels > 1 and (size % 2 or blocks % 2 ** (levels - 1)):
        raise malformed(
            origin,
            R,
            "these blocks form no butterfly",
            f"an even size and a multiple of {2 ** (levels - 1)} blocks",
            list(R.shape),
        )
    if len(s.shape) != 2 or 1 not in s.shape:
        raise malformed(origin, s, "is not one scale per output feature", "[o, 1]", list(s.shape))
    return OftModule(
        name, R.name, "linear", 1, blocks * size, False, R.dtype, "butterfly", s.name, s.numel
    )
