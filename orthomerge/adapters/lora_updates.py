"""What a LoRA adapter does to base weights: the change of each, exact in fp32 or fp64.

Shapes are checked against the base's headers before a tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthomerge.adapters.keys import base_weight_name
from orthomerge.adapters.lora import LoraAdapter, LoraModule
from orthomerge.adapters.lora_renaming import FlattenedNames
from orthomerge.adapters.rotated import read_finite
from orthomerge.errors import AdapterError, NumericalError, OrthoMergeError

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["LoraBiasUpdate", "LoraUpdate", "lora_updates"]

_REMEDY = "Give the base model that the adapter was trained on."
_NO_BIAS = "the adapter has a bias for a layer that has none in the base"


@dataclass(frozen=True)
class LoraUpdate:
    """The change of one weight by LoRA or DoRA.

    Attributes:
        adapter: The adapter.
        module: The module in it.
        transposed: The base stores the weight as [in, out].
        kind: Always "lora".
    """

    adapter: LoraAdapter
    module: LoraModule
    transposed: bool = False
    kind: str = "lora"

    @property
    def keys(self) -> tuple[str, ...]:
        """Tensors of the adapter it reads."""
        return self.module.weight_keys

    @property
    def turned(self) -> bool:
        """Whether the columns of the base's weight are the output features, as in embeddings."""
        return self.transposed or self.module.kind == "embedding"

    @property
    def read_bytes(self) -> int:
        """Their size."""
        return sum(self.adapter.source.tensors[key].nbytes for key in self.keys)

    @property
    def needs_base(self) -> bool:
        """Whether the base weight itself must be given: for DoRA only."""
        return self.module.magnitude_key is not None

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, A) whose product is the change, in the base tensor's own orientation.

        Without DoRA's magnitudes, whose effect is no product of two thin factors.
        """
        B, A = self.adapter.factors(self.module.name, dtype)
        return (A.mT, B.mT) if self.transposed else (B, A)

    def delta(
        self, W0: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the change of the base weight, in its shape.

        ``D = scale B A``; with DoRA ``m (W0 + D) / ||W0 + D|| - W0``, one norm per output feature
        (per column of an embedding, as PEFT does).

        Args:
            W0: The base weight in ``dtype``; may be None without DoRA.
            shape: Its shape.
            dtype: Dtype to compute in, float32 or float64.

        Raises:
            AdapterError: DoRA without W0.
            NumericalError: The adapter is not finite, or a norm is zero.
        """
        from orthomerge.linalg import full_precision

        with full_precision():
            B, A = self.factors(dtype)
            if W0 is not None:
                B, A = B.to(W0.device), A.to(W0.device)
            D = (B @ A).reshape(shape)
            m = self.adapter.magnitude(self.module.name, dtype)
            if m is None:
                return D
            if W0 is None:
                raise AdapterError(
                    "DoRA cannot be applied without the base weight",
                    file=self.adapter.origin,
                    tensor=self.module.name,
                    remedy="Pass --base.",
                )
            return self._with_magnitudes(W0.reshape(shape) + D, m.to(W0.device)) - W0

    def _with_magnitudes(self, V: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        import torch

        kept = 1 if self.turned else 0
        axes = tuple(axis for axis in range(V.ndim) if axis != kept)
        norms = torch.linalg.vector_norm(V, dim=axes, keepdim=True)
        if bool((norms == 0).any()):
            raise NumericalError(
                "DoRA divides by the norm of a feature whose weights are all zero",
                file=self.adapter.origin,
                tensor=self.module.name,
                remedy=_REMEDY,
            )
        result: torch.Tensor = V * (m.reshape(norms.shape) / norms)
        return result


@dataclass(frozen=True)
class LoraBiasUpdate:
    """The change of one bias by a LoRA adapter with ``lora_bias``: scale times B's bias.

    Attributes:
        adapter: The adapter.
        module: The module in it.
        key: Name of B's bias.
        kind: Always "lora".
    """

    adapter: LoraAdapter
    module: LoraModule
    key: str
    kind: str = "lora"

    @property
    def keys(self) -> tuple[str, ...]:
        """Tensors of the adapter it reads."""
        return (self.key,)

    @property
    def read_bytes(self) -> int:
        """Their size."""
        return self.adapter.source.tensors[self.key].nbytes

    @property
    def needs_base(self) -> bool:
        """Whether the base's bias itself must be given: never."""
        return False

    def delta(
        self, W0: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the change of the bias, in its shape.

        Raises:
            NumericalError: It is not finite.
        """
        bias = read_finite(self.adapter.source, self.key, dtype).reshape(shape)
        return self.module.scale * (bias if W0 is None else bias.to(W0.device))


def lora_updates(
    adapter: LoraAdapter, base: Mapping[str, TensorInfo], problems: list[OrthoMergeError]
) -> list[tuple[str, LoraUpdate | LoraBiasUpdate]]:
    """Return the changes with the names of the base tensors they belong to.

    Args:
        adapter: The adapter.
        base: Headers of the base.
        problems: What is wrong is added here.
    """
    found: list[tuple[str, LoraUpdate | LoraBiasUpdate]] = []
    turned: list[LoraModule] = []
    plain: list[LoraModule] = []
    square: list[LoraModule] = []
    paths = _paths(adapter, base)
    for module in adapter.modules.values():
        try:
            path = module.name if paths is None else paths.path(module.name)
            name = base_weight_name(path, base)
            fits = _orientations(module, base[name])
            if not fits:
                raise _misfit(adapter, module, base[name])
            found.append((name, LoraUpdate(adapter, module, _transposed(adapter, fits))))
            if module.kind == "linear":
                (square if len(fits) == 2 else turned if fits[0] else plain).append(module)
            if module.bias_key is not None:
                bias = _bias_name(adapter, module, name, base)
                found.append((bias, _bias_update(adapter, module)))
        except OrthoMergeError as error:
            # Every layer of the model lacks its bias alike, so that is said once.
            if error.problem != _NO_BIAS or all(p.problem != _NO_BIAS for p in problems):
                problems.append(error.at(adapter.origin))
    problems += _orientation_problem(adapter, square, bool(turned), bool(plain))
    return found


def _paths(adapter: LoraAdapter, base: Mapping[str, TensorInfo]) -> FlattenedNames | None:
    """Return what finds the base's modules by names that have lost their dots."""
    if adapter.style != "kohya":
        return None
    return FlattenedNames(name.removesuffix(".weight") for name in base if name.endswith(".weight"))


def _orientations(module: LoraModule, info: TensorInfo) -> list[bool]:
    """Return how the change fits the weight: plain (False), transposed (True), both or not.

    A linear layer and a convolution with a kernel of 1 are the same, and models have either; the
    factors of a convolution may also be stored as matrices, as AdaLoRA does.
    """
    rows, size = module.rows, math.prod(module.shape)
    wanted, found = (rows, *module.shape), info.shape
    if len(wanted) == 2 < len(found):
        same = found[0] == rows and math.prod(found[1:]) == size
    elif len(found) == 2 < len(wanted):
        same = found == wanted[:2] and set(wanted[2:]) == {1}
    else:
        same = found == wanted
    fits = [False] if same else []
    if module.kind == "linear" and info.shape == (size, rows):
        fits.append(True)
    return fits


def _transposed(adapter: LoraAdapter, fits: list[bool]) -> bool:
    return fits[0] if len(fits) == 1 else adapter.config.value("fan_in_fan_out", bool, False)


def _orientation_problem(
    adapter: LoraAdapter, square: list[LoraModule], turned: bool, plain: bool
) -> list[OrthoMergeError]:
    """Refuse square weights when the rest contradicts the flag that says which way they lie."""
    flag = adapter.config.value("fan_in_fan_out", bool, False)
    if not square or not (plain if flag else turned):
        return []
    return [
        AdapterError(
            "this weight is square, and the other modules contradict the config about which axis "
            "its input is",
            file=adapter.origin,
            tensor=square[0].name,
            found=f"fan_in_fan_out {str(flag).lower()}",
            remedy="Merge it into its base with PEFT, and merge the full models.",
        )
    ]


def _misfit(adapter: LoraAdapter, module: LoraModule, info: TensorInfo) -> AdapterError:
    return AdapterError(
        "the adapter's factors do not fit this weight of the base",
        file=adapter.origin,
        tensor=info.name,
        expected=f"shape {[module.rows, *module.shape]}",
        found=list(info.shape),
        remedy=_REMEDY,
    )


def _bias_update(adapter: LoraAdapter, module: LoraModule) -> LoraBiasUpdate:
    return LoraBiasUpdate(adapter, module, module.bias_key or "")


def _bias_name(
    adapter: LoraAdapter, module: LoraModule, weight: str, base: Mapping[str, TensorInfo]
) -> str:
    name = f"{weight.removesuffix('.weight')}.bias"
    if name not in base:
        raise AdapterError(
            _NO_BIAS,
            file=adapter.origin,
            tensor=name,
            remedy="Merge the adapters without --base: PEFT adds their biases when it runs them.",
        )
    stored = adapter.source.tensors[module.bias_key or ""]
    if stored.numel != math.prod(base[name].shape):
        raise AdapterError(
            "the adapter's bias does not fit the base's",
            file=adapter.origin,
            tensor=stored.name,
            expected=list(base[name].shape),
            found=list(stored.shape),
            remedy=_REMEDY,
        )
    return name
