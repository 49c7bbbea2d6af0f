"""Merge methods in fp64, written from their formulas, and the one rounding to bf16 after them.

The yardstick of ``merge_exactness``: nothing here comes from orthomerge, and speed is no concern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["ORACLES", "near_midpoint", "round_to_bf16", "share_at_threshold", "step",
           "ulp_distance", "undecided_elections"]  # fmt: skip

_FP32_STEP = 2.0**-23
_FP32_STEP_IN_BF16_STEPS = 2.0**-16
_DROPPED_BITS = 45  # fp64 keeps 52 bits behind the point, bf16 keeps 7
_SMALLEST_NORMAL = 2.0**-126
_SMALLEST_STEP = 2.0**-133


def linear(base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``Σ w_i W_i / Σ w_i``."""
    total = sum(w * model.double() for w, model in zip(weights, models, strict=True))
    assert isinstance(total, Tensor)
    return total / sum(weights)


def task_arithmetic(
    base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float], *, scale: float
) -> Tensor:
    """``W_0 + λ Σ w_i D_i``."""
    assert base is not None
    W0 = base.double()
    total = torch.zeros_like(W0)
    for model, weight in zip(models, weights, strict=True):
        total += weight * (model.double() - W0)
    return W0 + scale * total


def ties(
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float,
    density: float,
) -> Tensor:
    """``W_0 + λ Σ w_i T_i / Σ w_i``, both sums over the models that agree with the elected sign.

    ``T_i`` is D_i where ``|D_i|`` reaches its k-th largest value, k = ⌊density · numel⌋, and 0
    elsewhere; the elected sign is that of ``Σ w_i T_i``, + for 0.
    """
    assert base is not None
    kept = [trimmed(base, model, density) for model in models]
    elected = sum(w * T for w, T in zip(weights, kept, strict=True))
    assert isinstance(elected, Tensor)
    sign = torch.where(elected >= 0, 1.0, -1.0).double()
    above, below = torch.zeros_like(sign), torch.zeros_like(sign)
    for T, weight in zip(kept, weights, strict=True):
        agrees = torch.sign(T) == sign
        above += torch.where(agrees, weight * T, 0.0)
        below += torch.where(agrees, weight, 0.0)
    mean = torch.where(below > 0, above / below, 0.0)
    return base.double() + scale * mean


def slerp(
    base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float], *, t: float
) -> Tensor:
    """``sin((1-t)θ)/sin θ · W_1 + sin(tθ)/sin θ · W_2``, θ the angle of the flat tensors."""
    first, second = (model.double() for model in models)
    cosine = (first * second).sum() / (first.square().sum().sqrt() * second.square().sum().sqrt())
    angle = math.acos(max(-1.0, min(1.0, cosine.item())))
    if math.sin(angle) < 1e-6:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


#: Method id -> oracle(base, models, weights, **settings).
ORACLES: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "task-arithmetic": task_arithmetic,
    "ties": ties,
    "slerp": slerp,
}


def delta32(base: Tensor, model: Tensor) -> Tensor:
    """Return the fp32 task vector, exact for bf16 values of similar size."""
    return model.float() - base.float()


def trim_threshold(base: Tensor, model: Tensor, density: float) -> float:
    """Return the k-th largest magnitude of the fp32 task vector."""
    magnitudes = delta32(base, model).abs().reshape(-1)
    k = max(1, math.floor(density * magnitudes.numel()))
    return torch.kthvalue(magnitudes, magnitudes.numel() - k + 1).values.item()


def trimmed(base: Tensor, model: Tensor, density: float) -> Tensor:
    """Return T_i: the task vector where it reaches its threshold, 0 elsewhere."""
    reach = delta32(base, model).abs() >= trim_threshold(base, model, density)
    return torch.where(reach, model.double() - base.double(), 0.0)


def undecided_elections(
    base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float], **settings: float
) -> Tensor:
    """Return where the sum that elects the sign cancels to less than fp32 can resolve.

    There the sign is that of the last rounding, in fp64 as in fp32: with weights 1 and 0.7, say,
    changes of 7 and -10 steps sum to zero on paper and to 1e-16 in fp64.
    """
    if base is None or "density" not in settings:
        return torch.zeros(models[0].shape, dtype=torch.bool)
    kept = [trimmed(base, model, settings["density"]) for model in models]
    votes = torch.stack([w * T for w, T in zip(weights, kept, strict=True)])
    return votes.sum(0).abs() < votes.abs().sum(0) * _FP32_STEP


def near_midpoint(exact: Tensor) -> Tensor:
    """Return where an fp64 result is within one fp32 step of the middle of two bf16 values."""
    middle = ((exact / step(exact)) % 1 - 0.5).abs()
    return middle < _FP32_STEP_IN_BF16_STEPS


def step(values: Tensor) -> Tensor:
    """Return the distance of neighbouring bf16 values at the magnitude of ``values``."""
    return torch.exp2(torch.frexp(values.double())[1].double() - 8).clamp_min(_SMALLEST_STEP)


def share_at_threshold(
    base: Tensor | None, models: Sequence[Tensor], settings: dict[str, Any]
) -> float:
    """Return the share of entries that equal the trim threshold, averaged over the models.

    These are all kept here. A tool that keeps exactly k entries drops some of them.
    """
    if base is None or "density" not in settings:
        return 0.0
    density = settings["density"]
    counts = [
        int((delta32(base, m).abs() == trim_threshold(base, m, density)).count_nonzero())
        for m in models
    ]
    return sum(counts) / (len(models) * base.numel())


def round_to_bf16(values: Tensor) -> Tensor:
    """Round fp64 once to bf16, to nearest, ties to even.

    torch's own conversion goes through fp32 and so rounds twice.
    """
    bits = values.view(torch.int64)
    lowest_kept = (bits >> _DROPPED_BITS) & 1
    half = (1 << (_DROPPED_BITS - 1)) - 1
    rounded = ((bits + half + lowest_kept) >> _DROPPED_BITS) << _DROPPED_BITS
    small = (values / _SMALLEST_STEP).round() * _SMALLEST_STEP  # torch.round goes to even
    exact = torch.where(values.abs() < _SMALLEST_NORMAL, small, rounded.view(torch.float64))
    return exact.to(torch.bfloat16)


def ulp_distance(found: Tensor, expected: Tensor) -> Tensor:
    """Return how many bf16 values apart two bf16 tensors are; +0 and -0 are the same."""
    return (_ordinal(found) - _ordinal(expected)).abs()


def _ordinal(values: Tensor) -> Tensor:
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
