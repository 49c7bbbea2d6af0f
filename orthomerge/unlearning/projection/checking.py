"""The doctor: is projection right on this model, with these losses, in this precision?

Moves the parameters and puts them back, bit for bit; trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from orthomerge.errors import NumericalError
from orthomerge.unlearning.projection.capturing import gradients_of
from orthomerge.unlearning.projection.correcting import Snapshot
from orthomerge.unlearning.projection.decomposing import decompose
from orthomerge.unlearning.projection.scopes import find_scope, local

__all__ = ["Checkup", "check_projection"]

_STEPS = tuple(10 ** (-exponent / 4) for exponent in range(2, 17))  # of the parameters' norm / 10
_NOISE = 30  # times the rounding of the loss: below it a difference says nothing
_LEAST_SLOPE, _RAW_SLOPE, _LEAST_GAIN, _MOST_RESIDUAL = 1.9, 1.2, 10.0, 1e-6


@dataclass(frozen=True, slots=True)
class Checkup:
    """Facts about projection on one model and two batches.

    Attributes:
        parameters: Protected entries.
        cosine: Cosine of forget and retain gradient.
        kept: Kept fraction of the forget gradient.
        residual: |cosine| of the retain gradient with the projected gradient.
        slope_raw: Growth of |dL_r| with the step's length along the raw gradient, log over log;
            1 is first order. None when fewer than three steps stand out from rounding.
        slope_projected: The same along the projected gradient; 2 is second order.
        derivative_raw: Measured derivative of L_r along the raw unit step, by central differences.
        derivative_projected: The same along the projected unit step.
        forget_change: Change of L_f by the longest projected step of the test that lowers it.
        oracles: Largest error on problems with known answers.
    """

    parameters: int
    cosine: float
    kept: float
    residual: float
    slope_raw: float | None
    slope_projected: float | None
    derivative_raw: float
    derivative_projected: float
    forget_change: float
    oracles: float

    def as_dict(self) -> dict[str, Any]:
        """Return the facts, ready for JSON."""
        return asdict(self)


def check_projection(
    model: nn.Module,
    forget_loss: Callable[[], torch.Tensor],
    retain_loss: Callable[[], torch.Tensor],
    *,
    scope: str | None = None,
) -> Checkup:
    """Measure that projected steps leave the retain loss alone to first order.

    Solves problems with known answers, then splits the forget gradient of this model and moves
    the parameters along the raw and the projected gradient by a range of steps: |dL_r| must grow
    with the step's length raw and with its square projected. In float32 second-order changes
    drown in rounding on some models; then the derivative itself must fall tenfold.

    Args:
        model: The model; its parameters are put back afterwards. Set it to eval mode, or losses
            with dropout will differ between calls.
        forget_loss: Loss of a forget batch, to be minimised; called many times.
        retain_loss: Loss of a retain batch.
        scope: See ``RetainProjector``.

    Raises:
        NumericalError: A loss is random or not finite, a gradient vanishes, or projection does
            not do what it promises.
    """
    parameters = find_scope(model, scope).parameters
    oracles = _oracle_error()
    if oracles > 1e-6:
        raise NumericalError("projection fails on problems with known answers", found=oracles)
    snapshot = Snapshot(parameters)
    g = _vectors(gradients_of(forget_loss(), parameters), parameters)
    r = _vectors(gradients_of(retain_loss(), parameters), parameters)
    lengths = [_dot(v, v) ** 0.5 for v in (g, r)]
    if not all(0 < length < math.inf for length in lengths):
        raise NumericalError(
            "a gradient is zero or not finite",
            found=f"norms {lengths[0]:.3g} (forget), {lengths[1]:.3g} (retain)",
        )
    first, second = _value(retain_loss), _value(retain_loss)
    if not math.isfinite(first) or first != second:
        raise NumericalError(
            "the retain loss differs between two calls",
            found=[first, second],
            remedy="Put the model in eval mode and fix the batch.",
        )
    normal = decompose(g, [r]).normal
    found = _moved(snapshot, g, normal, forget_loss, retain_loss)
    checkup = Checkup(
        parameters=sum(local(p).numel() for p in parameters),
        cosine=_dot(g, r) / (lengths[0] * lengths[1]),
        kept=_dot(normal, normal) ** 0.5 / lengths[0],
        residual=abs(_dot(normal, r)) / (_dot(normal, normal) ** 0.5 * lengths[1] or 1.0),
        oracles=oracles,
        **found,
    )
    _judge(checkup)
    return checkup


def _judge(checkup: Checkup) -> None:
    """Refuse a checkup whose numbers contradict the theory."""
    if checkup.residual > _MOST_RESIDUAL:
        raise NumericalError(
            "the projected gradient is not orthogonal to the retain gradient",
            expected=f"at most {_MOST_RESIDUAL}",
            found=checkup.residual,
        )
    slope, raw = checkup.slope_projected, checkup.slope_raw
    second_order = slope is not None and slope >= _LEAST_SLOPE
    gained = abs(checkup.derivative_projected) * _LEAST_GAIN <= abs(checkup.derivative_raw)
    if not (second_order or gained) or (raw is not None and raw > _RAW_SLOPE and not gained):
        raise NumericalError(
            "projected steps move the retain loss to first order",
            expected=f"slope of at least {_LEAST_SLOPE}, or a derivative ten times smaller",
            found=f"slope {slope}, derivative {checkup.derivative_projected:.3g} against "
            f"{checkup.derivative_raw:.3g}",
            remedy="Check that both losses come from the model's trained parameters.",
        )


def _moved(
    snapshot: Snapshot,
    g: Sequence[torch.Tensor],
    normal: Sequence[torch.Tensor],
    forget_loss: Callable[[], torch.Tensor],
    retain_loss: Callable[[], torch.Tensor],
) -> dict[str, Any]:
    """Measure losses along both directions; the parameters are back afterwards."""
    size = sum(float(torch.linalg.vector_norm(p.double())) ** 2 for p in snapshot.parameters)
    steps = [size**0.5 / 10 * step for step in _STEPS]
    eps = min(torch.finfo(p.dtype).eps for p in snapshot.parameters)
    forget = _value(forget_loss)
    try:
        found: dict[str, Any] = {}
        for name, direction in (("raw", g), ("projected", normal)):
            length = _dot(direction, direction) ** 0.5
            if length == 0:
                found |= {f"slope_{name}": None, f"derivative_{name}": 0.0, "forget_change": 0.0}
                continue
            unit = [-v / length for v in direction]
            found |= _along(snapshot, unit, steps, eps, retain_loss, name)
            changes = [_at(snapshot, unit, step, forget_loss) - forget for step in steps]
            found["forget_change"] = next((c for c in changes if c < 0), changes[-1])
    finally:
        snapshot.restore()
    return found


def _along(
    snapshot: Snapshot,
    unit: Sequence[torch.Tensor],
    steps: Sequence[float],
    eps: float,
    loss: Callable[[], torch.Tensor],
    name: str,
) -> dict[str, float | None]:
    """Return slope and derivative of the loss along a unit direction."""
    start = _at(snapshot, unit, 0.0, loss)
    forth = [_at(snapshot, unit, step, loss) for step in steps]
    noise = _NOISE * eps * max(abs(start), 1.0)
    clear = [
        (s, abs(f - start)) for s, f in zip(steps, forth, strict=True) if abs(f - start) > noise
    ]
    slope = _fit(clear[-6:]) if len(clear) >= 3 else None
    # A step whose square error and rounding are about equal: eps^(1/3) of the scale.
    step = min(steps, key=lambda s: abs(math.log(s / (steps[0] * eps ** (1 / 3)))))
    ahead, back = _at(snapshot, unit, step, loss), _at(snapshot, unit, -step, loss)
    return {f"slope_{name}": slope, f"derivative_{name}": (ahead - back) / (2 * step)}


def _fit(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of log y over log x."""
    x = torch.tensor([point[0] for point in points], dtype=torch.float64).log()
    y = torch.tensor([point[1] for point in points], dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x))


def _at(
    snapshot: Snapshot,
    unit: Sequence[torch.Tensor],
    step: float,
    loss: Callable[[], torch.Tensor],
) -> float:
    for index, direction in enumerate(unit):
        snapshot.write(index, step * direction.reshape(-1))
    return _value(loss)


@torch.no_grad()
def _value(loss: Callable[[], torch.Tensor]) -> float:
    return float(loss())


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _vectors(
    gradients: Sequence[torch.Tensor | None], parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    pairs = zip(gradients, parameters, strict=True)
    wide = [torch.zeros_like(local(p)) if g is None else local(g) for g, p in pairs]
    return [v.to(torch.promote_types(v.dtype, torch.float32)) for v in wide]


def _oracle_error() -> float:
    """Return the largest error on small problems whose answers are known by hand."""
    T = torch.tensor
    one, other = [T([2.0]), T([1.0])], [T([1.0]), T([3.0])]
    pair = [[T([1.0, 0, 1])], [T([0.0, 1, 1])]]
    cases = [
        (decompose(one, [other]).normal, (1.5, -0.5)),
        (decompose(one, [other], granularity="per-tensor").normal, (0.0, 0.0)),
        (
            decompose([T([2.0, 1.0])], [[T([1.0, 3.0])]], [T([1.0, 0.25])]).normal,
            (15 / 13, -20 / 13),
        ),
        (decompose([T([3.0, 1, -2])], pair).normal, (2.0, 2, -2)),
        (decompose([T([3.0, 1, -2])], [*pair, [T([1.0, 1, 2])]]).normal, (2.0, 2, -2)),
        (decompose([T([2.0, 1])], [[T([1.0, 1])]], mode="cone").normal, (2.0, 1)),
        (decompose([T([-2.0, 1])], [[T([1.0, 1])]], mode="cone").normal, (-1.5, 1.5)),
        (
            decompose(
                [T([3.0, -4, 5])],
                [[T([1.0, 0, 0])], [T([0.0, 1, 0])]],
                mode="sign",
                retain=[T([2.0, 1, 0])],
            ).normal,
            (2.5, 0.0, 5),
        ),
    ]
    return max(
        float((torch.cat([t.reshape(-1) for t in found]) - T(expected)).abs().max())
        for found, expected in cases
    )
