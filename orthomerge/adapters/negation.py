"""The inverse of an adapter as an adapter: applied after the first, it gives the base back.

Nothing is written here; the caller gets tensors and a config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orthomerge.adapters.boft import BoftAdapter
from orthomerge.adapters.convention import EXACT
from orthomerge.adapters.export import stored_from_canonical
from orthomerge.adapters.hra import HraAdapter
from orthomerge.adapters.lora import LoraAdapter
from orthomerge.adapters.oft import OftAdapter
from orthomerge.adapters.rotated import RotationAdapter, read_finite
from orthomerge.adapters.sources import Source
from orthomerge.errors import AdapterError, NumericalError

if TYPE_CHECKING:
    import torch

__all__ = ["negated"]

_Tensors = dict[str, "torch.Tensor"]


def negated(source: Source, *, strength: float = 1.0) -> tuple[_Tensors, dict[str, Any]]:
    """Return the adapter that undoes a given one.

    OFT: A -> -strength A, hence R^{-1} at 1. LoRA: B -> -strength B. BOFT of one factor like OFT;
    HRA: the reflections in reverse order.

    A Cayley-Neumann adapter is written with the exact Cayley map, as the generator of the rotation
    nearest to its series. No rotation undoes more: the series K with m = max(3, terms - 1) scales
    some directions by up to ``1 - ||A||^m`` (m even) or ``1 + ||A||^{2m} / 2`` (m odd), and this
    remains. The negated series would leave twice as much for even m.

    Args:
        source: The adapter.
        strength: How much of it to undo; above 1 goes beyond the base.

    Returns:
        Tensors by name, in the adapter's dtypes, and the content of adapter_config.json.

    Raises:
        AdapterError: Its inverse is no adapter of its kind: DoRA, BOFT of several factors, whole
            tensors; or ``strength`` does not apply to it.
        NumericalError: The adapter is not finite.
    """
    import math

    if not math.isfinite(strength):
        raise AdapterError("the strength must be finite", found=strength)
    adapter = source.lora or source.rotations
    if adapter is None:
        raise _impossible(source.origin, f"{source.description} cannot be negated")
    if adapter.others:
        raise _impossible(
            source.origin, "it replaces whole tensors", found=next(iter(adapter.others))
        )
    if isinstance(adapter, LoraAdapter):
        return _negated_lora(adapter, strength)
    for kind, negate in _NEGATE.items():
        if isinstance(adapter, kind):
            tensors, changes = negate(adapter, strength)
            return tensors, {**adapter.config.values, **changes}
    raise _impossible(source.origin, f"{source.description} cannot be negated")


def _negated_lora(adapter: LoraAdapter, strength: float) -> tuple[_Tensors, dict[str, Any]]:
    if adapter.style != "peft":
        raise AdapterError(
            f"only adapters in PEFT's format can be negated, and this is in {adapter.style}'s",
            file=adapter.origin,
            remedy=f"Merge it alone: orthomerge merge {adapter.origin} --method passthrough "
            "--set scale=-1 -o OUT.safetensors.",
        )
    if adapter.dora:
        raise _impossible(adapter.origin, "DoRA divides by norms of the base's weights")
    negative = {
        key
        for module in adapter.modules.values()
        for key in (module.b_key, module.bias_key)
        if key is not None
    }
    tensors = {}
    for module in adapter.modules.values():
        for key in (*module.weight_keys, *([module.bias_key] if module.bias_key else [])):
            stored = adapter.source.read(key)
            values = read_finite(adapter.source, key, _wide(stored))
            tensors[key] = (-strength * values if key in negative else values).to(stored.dtype)
    return tensors, dict(adapter.config.values)


def _negated_oft(adapter: RotationAdapter, strength: float) -> tuple[_Tensors, dict[str, Any]]:
    """Negate generators; the limits of ``coft`` are applied now and then lifted."""
    import torch

    tensors: _Tensors = {}
    for name, module in adapter.modules.items():
        dtype = adapter.source.read(module.key).dtype
        if module.layout == "packed":
            A = -strength * _nearest_generator(adapter, name)
            tensors[module.key] = stored_from_canonical(A, module.kind, EXACT).to(dtype)
            continue
        A = -strength * adapter.skew(name, torch.float64)
        tensors[module.key] = A.to(dtype)
        if module.scale_key is not None:
            tensors[module.scale_key] = _inverse_scale(adapter, module.scale_key, strength)
    changes: dict[str, Any] = {"coft": False}
    if "use_cayley_neumann" in adapter.config.values or adapter.convention != EXACT:
        changes["use_cayley_neumann"] = False
    return tensors, changes


def _nearest_generator(adapter: RotationAdapter, name: str) -> torch.Tensor:
    """Return A with Cayley(A) the rotation nearest to what the adapter does, its polar factor."""
    import torch

    from orthomerge.linalg import inverse_cayley

    A = adapter.skew(name, torch.float64)
    if not adapter.convention.cayley_neumann:
        return A
    U, _, Vh = torch.linalg.svd(adapter.blocks(name, torch.float64))
    return inverse_cayley(U @ Vh)


def _negated_boft(adapter: RotationAdapter, strength: float) -> tuple[_Tensors, dict[str, Any]]:
    import torch

    tensors: _Tensors = {}
    for module in adapter.modules.values():
        stored = adapter.source.read(module.key)
        if stored.shape[0] > 1:
            raise _impossible(
                adapter.origin, "the inverse of several butterfly factors is no BOFT adapter"
            )
        values = read_finite(adapter.source, module.key, torch.float64)
        tensors[module.key] = (-strength * values).to(stored.dtype)
        if module.scale_key is not None:
            tensors[module.scale_key] = _inverse_scale(adapter, module.scale_key, strength)
    return tensors, {}


def _negated_hra(adapter: RotationAdapter, strength: float) -> tuple[_Tensors, dict[str, Any]]:
    if strength != 1:
        raise _impossible(adapter.origin, "reflections are undone as a whole", found=strength)
    orthogonalised = adapter.config.value("apply_GS", bool, False)
    tensors = {}
    for module in adapter.modules.values():
        stored = adapter.source.read(module.key)
        read_finite(adapter.source, module.key, stored.dtype)
        # I - 2 U U^T is its own inverse; a product is undone in reverse order.
        tensors[module.key] = stored if orthogonalised else stored.flip(1).contiguous()
    return tensors, {}


_Negate = Callable[[RotationAdapter, float], tuple[_Tensors, dict[str, Any]]]
_NEGATE: dict[type[RotationAdapter], _Negate] = {
    OftAdapter: _negated_oft,
    BoftAdapter: _negated_boft,
    HraAdapter: _negated_hra,
}


def _inverse_scale(adapter: RotationAdapter, key: str, strength: float) -> torch.Tensor:
    """Return ``s^(-strength)``."""
    stored = adapter.source.read(key)
    s = read_finite(adapter.source, key, _wide(stored))
    if bool((s <= 0).any()) and (strength != 1 or bool((s == 0).any())):
        raise NumericalError(
            "a scale that is not positive has no such inverse",
            file=adapter.origin,
            tensor=key,
            remedy="Use strength 1 and an adapter without zero scales.",
        )
    return (1 / s if strength == 1 else s.pow(-strength)).to(stored.dtype)


def _wide(stored: torch.Tensor) -> torch.dtype:
    import torch

    return torch.promote_types(stored.dtype, torch.float32)


def _impossible(origin: str, reason: str, found: object = None) -> AdapterError:
    return AdapterError(
        f"has no inverse that is an adapter of its kind: {reason}",
        file=origin,
        found=found,
        remedy="Subtract it from the base's weights instead.",
    )
