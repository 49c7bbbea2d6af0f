"""What every adapter that rotates weights has in common: its modules, and how they are asked.

OFT in each of its layouts, BOFT and HRA all turn a weight; each kind's file says how its numbers
become a rotation. Nothing here knows one kind from another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.convention import Kind, OftConvention
from orthomerge.adapters.effective import BackMap, rotation
from orthomerge.errors import NumericalError

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["Layout", "OftModule", "RotationAdapter", "Side", "TensorSource", "read_finite"]

Layout = Literal["packed", "full", "left", "butterfly", "reflections"]
Side = Literal["right", "left"]


class TensorSource(Protocol):
    """What an adapter is read from; every opened checkpoint is one."""

    @property
    def origin(self) -> str:
        """Where it came from, as the user wrote it."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, by name."""

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor."""


@dataclass(frozen=True, slots=True)
class OftModule:
    """One rotated module, from its tensors' headers.

    Attributes:
        name: Module path in the base model.
        key: The name of the rotation's tensor in the adapter.
        kind: "embedding", or "linear" for linear and convolution layers.
        num_blocks: Blocks of the generator; 1 when ``shared``.
        block_size: From the tensor's shape: PEFT adjusts the config's value layer by layer.
        shared: The one stored block stands for all blocks on the diagonal.
        dtype: As stored, in the spelling of the safetensors format.
        layout: How the rotation is stored: "packed" (OFT since PEFT 0.16), "full" (OFT of 0.14 and
            0.15), "left" (OFT before 0.14), "butterfly" (BOFT) or "reflections" (HRA).
        scale_key: The name of the tensor that scales the output features, if there is one.
        rows: Output features, where the scale tells them.
    """

    name: str
    key: str
    kind: Kind
    num_blocks: int
    block_size: int
    shared: bool
    dtype: str
    layout: Layout = "packed"
    scale_key: str | None = None
    rows: int | None = None

    @property
    def side(self) -> Side:
        """Side of the weight that the rotation acts on; "left" mixes output features."""
        return "left" if self.layout == "left" else "right"

    @property
    def keys(self) -> tuple[str, ...]:
        """Every tensor of the adapter that the module is made of."""
        return (self.key,) if self.scale_key is None else (self.key, self.scale_key)


@dataclass(frozen=True)
class RotationAdapter(ABC):
    """An adapter that rotates weights: what it rotates, how, and what else it carries.

    Attributes:
        origin: Where it came from, as the user wrote it.
        config: Its ``adapter_config.json``.
        convention: How its generators become rotations.
        modules: Rotated modules, by module path.
        others: Whole tensors that replace the base's (``modules_to_save``, trained biases):
            base tensor name -> name in the adapter.
        base_copies: Unrotated weights of targeted embeddings (input or output) that PEFT saved
            along, to which the rotation still applies: base tensor name -> name in the adapter.
    """

    origin: str
    config: AdapterConfig
    convention: OftConvention
    modules: dict[str, OftModule]
    others: dict[str, str]
    base_copies: dict[str, str]
    source: TensorSource = field(repr=False, compare=False)

    @property
    @abstractmethod
    def description(self) -> str:
        """What it is, in words."""

    @abstractmethod
    def skew(self, module_name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a module's canonical skew blocks A [nb, b, b].

        The effective weight is ``diag(s) W0 Cayley(A)``, on the left side ``Cayley(A) W0``.

        Args:
            module_name: A key of ``modules``.
            dtype: Dtype to compute in, float32 or float64.

        Raises:
            NumericalError: The tensor is not finite, or the rotation has no such generator.
        """

    def blocks(
        self, module_name: str, dtype: torch.dtype, back_map: BackMap = "as_trained"
    ) -> torch.Tensor:
        """Return the blocks [nb, b, b] of a module's rotation, as the adapter was trained.

        Raises:
            NumericalError: The tensor is not finite.
        """
        return rotation(self.skew(module_name, dtype), self.convention, back_map)

    def scale(self, module_name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the factor of each output feature, [o], or None where there is none.

        Raises:
            NumericalError: The tensor is not finite.
        """
        key = self.modules[module_name].scale_key
        return None if key is None else read_finite(self.source, key, dtype).reshape(-1)


def read_finite(source: TensorSource, key: str, dtype: torch.dtype) -> torch.Tensor:
    """Read a tensor of an adapter and refuse NaN and infinite values.

    Raises:
        NumericalError: It holds some.
    """
    values = source.read(key).to(dtype)
    # A sum is many times cheaper than a look at every entry, and not finite where an entry is not;
    # it may also overflow by itself.
    if not math.isfinite(values.sum().item()) and not bool(values.isfinite().all()):
        raise NumericalError(
            "holds NaN or infinite values",
            file=source.origin,
            tensor=key,
            remedy="Its training diverged or the file is damaged; leave the adapter out.",
        )
    return values
