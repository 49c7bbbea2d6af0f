"""DO-Merging of one module's low-rank updates: gauge, orthogonalise, decouple, merge, scale.

The stages are in ``stacks`` and ``magnitudes``, each usable by itself; the method's registration
and its formula are in ``methods/do_merging``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orthomerge.errors import NumericalError
from orthomerge.linalg.factors import Factors
from orthomerge.merging.lora.lifting import run_nested_factors
from orthomerge.merging.lora.magnitudes import automatic_scale, decouple, reattach
from orthomerge.merging.lora.presets import resolved_preset
from orthomerge.merging.lora.stacks import Stack, balance, orthogonalise
from orthomerge.merging.registry import Merged

__all__ = ["do_merge"]

# Norms below this, relative to Σ |w_i| ||D_i||, are rounding: the updates have cancelled.
_CANCELLED = {torch.float64: 1e-7, torch.float32: 1e-6}
_SOLVER = ("target", "strength", "gamma", "normalise", "steps", "tolerance")
_DECOUPLING = ("magnitude", "zero_columns", "cap")


def do_merge(
    factors: Sequence[Factors],
    weights: Sequence[float],
    given: Mapping[str, Any],
) -> Merged:
    """Merge the updates of one module, or of a batch of equal-shaped ones.

    Args:
        factors: One update per adapter.
        weights: One per adapter; those at 0 are left out.
        given: The method's parameters, and what a nested method is supplied with.
    """
    settings = resolved_preset(given, len(factors))
    if len(weights) != len(factors):
        raise NumericalError("one weight per adapter", expected=len(factors), found=len(weights))
    kept = [i for i, w in enumerate(weights) if w != 0] or [0]
    original = Stack.of([factors[i] for i in kept], [weights[i] for i in kept])
    if settings["gauge"] == "balanced":
        original = balance(original)
    options = {key: settings[key] for key in _SOLVER}
    stack, facts = orthogonalise(original, settings["orthogonalise"], **options)
    norms = original.norms()
    if settings["draws"] is not None:
        settings["draws"] = settings["draws"].of(kept)
    merged, size = _combined(stack, original, settings)
    bound = (stack.weights.abs() * norms).sum(-1)
    cancelled = size <= _CANCELLED[merged.A.dtype] * bound
    size = torch.where(cancelled, 0.0, size)
    if settings["scale"] == "auto":
        scale = automatic_scale(norms, stack.weights, size)
    else:
        scale = torch.full_like(size, settings["scale"])
    facts = {"scale": scale, **facts, "imbalance": _imbalance(norms, stack.weights)}
    scale = torch.where(cancelled, 0.0, scale)
    return Merged(merged.scaled(scale), _plain(facts), norm=size * scale.abs())


def _combined(stack: Stack, original: Stack, settings: Mapping[str, Any]) -> tuple[Factors, Tensor]:
    """Return the merged update at λ = 1 and its norm."""
    turned, strength = settings["axis"] == "out", settings["decouple_strength"]
    if turned:
        stack, original = stack.turned(), original.turned()
    decoupled = None
    if strength or settings["renormalise"]:
        options = {key: settings[key] for key in _DECOUPLING}
        source = settings["magnitude_source"]
        decoupled = decouple(stack, original, strength=strength, source=source, **options)
    columns = None if decoupled is None else decoupled.inverse
    if settings["op"] is None:
        merged = stack.sum(columns)
    else:
        merged = _by_method(settings, stack, columns, turned)
    plain = decoupled is None and settings["op"] is None
    if decoupled is not None:
        merged = reattach(merged, decoupled, renormalise=settings["renormalise"])
    size = stack.sum_norm() if plain else merged.norm()
    return merged.turned() if turned else merged, size


def _by_method(
    settings: Mapping[str, Any], stack: Stack, columns: Tensor | None, turned: bool
) -> Factors:
    """Merge by another method, which sees the updates the right way round."""
    parts = [part.turned() if turned else part for part in stack.parts(columns)]
    merged = run_nested_factors(settings["op"], parts, weights=stack.given, draws=settings["draws"])
    return merged.turned() if turned else merged


def _imbalance(norms: Tensor, weights: Tensor) -> Tensor:
    """Return how many times larger the largest update is than the smallest [...]; 1 for none."""
    live = weights != 0
    largest = torch.where(live, norms, 0.0).amax(-1)
    smallest = torch.where(live, norms, torch.inf).amin(-1)
    return torch.where(live.any(-1), largest / smallest, 1.0)


def _plain(facts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return numbers for one module, tensors for a batch."""
    return {key: value if value.ndim else float(value) for key, value in facts.items()}
