"""The same LoRA module of several adapters side by side; ranks may differ, shapes may not.

Headers only; the numbers follow in ``executors.factor_inputs``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orthomerge.adapters.lora import LoraAdapter, LoraKind, LoraModule
from orthomerge.errors import AdapterError, OrthoMergeError

__all__ = ["JoinedLora", "join_lora", "joined_lora"]


@dataclass(frozen=True, slots=True)
class JoinedLora:
    """One module of the output.

    Attributes:
        name: Module path.
        parts: The module in each adapter; None where it has none.
    """

    name: str
    parts: tuple[LoraModule | None, ...]

    @property
    def first(self) -> LoraModule:
        """The module in the first adapter that has it."""
        return next(part for part in self.parts if part is not None)

    @property
    def kind(self) -> LoraKind:
        """Linear, convolution or embedding."""
        return self.first.kind

    @property
    def rows(self) -> int:
        """Output features o."""
        return self.first.shape[0] if self.kind == "embedding" else self.first.rows

    @property
    def columns(self) -> int:
        """Input features n: c·kh·kw of a convolution, the vocabulary of an embedding."""
        return self.first.rows if self.kind == "embedding" else math.prod(self.first.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution, else empty."""
        return self.first.shape[1:] if self.kind == "conv" else ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank in each adapter; 0 where it has none."""
        return tuple(part.rank if part else 0 for part in self.parts)

    @property
    def biased(self) -> bool:
        """Whether any adapter trained a bias along."""
        return any(part is not None and part.bias_key is not None for part in self.parts)

    @property
    def dora(self) -> bool:
        """Whether any adapter has DoRA's magnitudes here."""
        return any(part is not None and part.magnitude_key is not None for part in self.parts)


def join_lora(name: str, adapters: Sequence[LoraAdapter]) -> JoinedLora:
    """Return one module over all adapters."""
    return JoinedLora(name, tuple(adapter.modules.get(name) for adapter in adapters))


def joined_lora(
    adapters: Sequence[LoraAdapter], problems: list[OrthoMergeError]
) -> dict[str, JoinedLora]:
    """Return the modules of all adapters by module path, in the order they appear.

    Args:
        adapters: The adapters.
        problems: Modules whose shapes differ between adapters are reported here.
    """
    names = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    joined = {name: join_lora(name, adapters) for name in names}
    for module in joined.values():
        shapes = [(p.kind, p.rows, p.shape) for p in module.parts if p is not None]
        if len(set(shapes)) > 1:
            problems.append(_shape_problem(module, adapters))
    return joined


def _shape_problem(module: JoinedLora, adapters: Sequence[LoraAdapter]) -> AdapterError:
    found = [
        f"{part.kind} {[part.rows, *part.shape]} in {adapter.origin}"
        for adapter, part in zip(adapters, module.parts, strict=True)
        if part is not None
    ]
    return AdapterError(
        "the adapters change weights of different shapes here",
        tensor=module.name,
        found=", ".join(found),
        remedy="Only adapters of one base model can be merged.",
    )
