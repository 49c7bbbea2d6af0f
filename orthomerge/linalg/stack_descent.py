"""Descent on the overlap of stacked row blocks: gradient descent and L-BFGS on Gram matrices, Adam.

Closed forms, and the choice between all of these, are in ``orthogonal_stacks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthomerge.linalg.block_diagonals import block_mask
from orthomerge.linalg.precision import full_precision

__all__ = ["adam_stack", "descend_gd", "descend_lbfgs"]

_ARMIJO = 1e-4
_MOST_HALVINGS = 60
_HISTORY = 20
_SETTLED = 1e-3  # a relative change of the loss below this times the tolerance ends the descent


@dataclass(frozen=True, slots=True)
class _Objective:
    """``L(C) = ||off(V V^T)||^2 + γ ||V - W||^2`` of V = C W, known through ``G = W W^T``."""

    G: Tensor
    off: Tensor
    gamma: float

    def gradient(self, C: Tensor) -> tuple[Tensor, Tensor]:
        """Return L [...] and the H with ``∇L = H W``, ``H = 4 off(V V^T) C + 2γ (C - I)``."""
        overlaps = (C @ self.G @ C.mT) * self.off
        moved = C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        loss = _sum(overlaps.square()) + self.gamma * _sum((moved @ self.G) * moved)
        return loss, 4 * overlaps @ C + 2 * self.gamma * moved

    def along(self, C: Tensor, D: Tensor) -> Tensor:
        """Return the coefficients [..., 5] of ``t -> L(C + t D)``, constant first."""
        DG = D @ self.G
        zeroth = (C @ self.G @ C.mT) * self.off
        first = (DG @ C.mT) * self.off
        first = first + first.mT
        second = (DG @ D.mT) * self.off
        moved = C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        pull = [(moved @ self.G) * moved, 2 * DG * moved, DG * D]
        return torch.stack(
            [
                _sum(zeroth.square()) + self.gamma * _sum(pull[0]),
                _sum(2 * zeroth * first) + self.gamma * _sum(pull[1]),
                _sum(first.square() + 2 * zeroth * second) + self.gamma * _sum(pull[2]),
                _sum(2 * first * second),
                _sum(second.square()),
            ],
            dim=-1,
        )


@full_precision()
def descend_gd(
    G: Tensor,
    sizes: Sequence[int],
    gamma: float,
    *,
    steps: int,
    tolerance: float,
    rate: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimise the overlap by gradient descent, on the Gram matrix alone.

    ``C <- C - η [4 off(C G C^T) C + 2γ (C - I)]`` makes of V = C W exactly the descent that
    ``V <- V - η ∇L(V)`` makes. η starts at ``1 / (4 ||off||_2 + 8 ||V||_2^2 + 2γ)``, is halved
    until L falls enough and doubled after each step, so that L never rises.

    Args:
        G: ``W W^T`` [..., R, R] in float64.
        sizes: Rows of each block.
        gamma: γ, what moving away from W costs.
        steps: Most steps.
        tolerance: Stop where ``||∇L|| <= tolerance (1 + L)``, or L all but stands still.
        rate: A fixed η instead.

    Returns:
        C [..., R, R] and the number of steps taken [...].
    """
    objective = _Objective(G, block_mask(G, sizes), gamma)
    C = _identity(G)
    eta = _safe_rate(objective) if rate is None else torch.full_like(G[..., 0, 0], rate)
    moving = torch.ones_like(eta, dtype=torch.bool)
    taken = torch.zeros_like(eta, dtype=torch.int64)
    loss, H = objective.gradient(C)
    for _ in range(steps):
        slope = _sum((H @ G) * H)
        moving = moving & (slope.sqrt() > tolerance * (1 + loss))
        if not bool(moving.any()):
            break
        if rate is None:
            eta = _armijo(objective.along(C, -H), slope, eta)
        C = C - torch.where(moving, eta, 0.0)[..., None, None] * H
        taken += moving
        before = loss
        loss, H = objective.gradient(C)
        moving = moving & _still_falling(before, loss, tolerance)
        eta = eta if rate is not None else 2 * eta
    return C, taken


@full_precision()
def descend_lbfgs(
    G: Tensor, sizes: Sequence[int], gamma: float, *, steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Minimise the overlap by L-BFGS, on the Gram matrix alone.

    In the inner product ``<X, Y> = tr(X G Y^T)`` of ``X W`` and ``Y W``, which makes it the L-BFGS
    of V itself. L along a line is a polynomial of degree four, so each step goes to its minimum.

    Args:
        G: ``W W^T`` [..., R, R] in float64.
        sizes: Rows of each block.
        gamma: γ, what moving away from W costs.
        steps: Most steps.
        tolerance: Stop where ``||∇L|| <= tolerance (1 + L)``, or L all but stands still.

    Returns:
        C [..., R, R] and the number of steps taken [...].

    References:
        Nocedal, "Updating quasi-Newton matrices with limited storage", 1980.
    """
    objective = _Objective(G, block_mask(G, sizes), gamma)
    C, history = _identity(G), _History(G)
    moving = torch.ones_like(G[..., 0, 0], dtype=torch.bool)
    taken = torch.zeros_like(moving, dtype=torch.int64)
    loss, H = objective.gradient(C)
    for _ in range(steps):
        moving = moving & (_sum((H @ G) * H).sqrt() > tolerance * (1 + loss))
        if not bool(moving.any()):
            break
        D = -history.precondition(H)
        length = torch.where(moving, _lowest_point(objective.along(C, D)), 0.0)
        step = length[..., None, None] * D
        before, H_before = loss, H
        C = C + step
        taken += moving
        loss, H = objective.gradient(C)
        history.add(step, H - H_before)
        moving = moving & _still_falling(before, loss, tolerance)
    return C, taken


@full_precision()
def adam_stack(
    W: Tensor, sizes: Sequence[int], gamma: float, *, steps: int, rate: float = 0.01
) -> Tensor:
    """Minimise the overlap by Adam on the stack itself.

    Adam divides by the size of each entry's own gradient, so it leaves the span of W's rows and
    depends on their basis: it cannot be run on Gram matrices. Its cost grows with d.

    Args:
        W: Stacked rows [..., R, d]; rows of zeros stay zero.
        sizes: Rows of each block.
        gamma: γ, what moving away from W costs.
        steps: Number of steps.
        rate: Learning rate, in units of the root mean square of W's entries.

    Returns:
        V, of W's shape.

    References:
        Kingma and Ba, arXiv:1412.6980, at their β = (0.9, 0.999), ε = 1e-8.
    """
    off = block_mask(W, sizes)
    rows = (W != 0).any(-1).sum(-1).clamp(min=1)
    size = W.square().sum(dim=(-2, -1)) / (rows * max(W.shape[-1], 1))
    eta = (rate * size.sqrt())[..., None, None]
    V, mean, square = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    for step in range(1, steps + 1):
        gradient = (4 * (V @ V.mT) * off) @ V
        gradient.add_(V - W, alpha=2 * gamma)
        mean.lerp_(gradient, 0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        denominator = torch.div(square, 1 - 0.999**step, out=gradient).sqrt_().add_(1e-8)
        V.sub_((mean * (eta / (1 - 0.9**step))).div_(denominator))
    return V


class _History:
    """The last steps and changes of the gradient, and the inverse Hessian they stand for."""

    def __init__(self, G: Tensor) -> None:
        self._G = G
        self._pairs: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        self._scale = torch.ones_like(G[..., :1, :1])

    def add(self, S: Tensor, Y: Tensor) -> None:
        SG, YG = S @ self._G, Y @ self._G
        curvature, square = _sum(SG * Y)[..., None, None], _sum(YG * Y)[..., None, None]
        usable = curvature > 1e-14 * square.clamp(min=torch.finfo(S.dtype).tiny)
        inverse = torch.where(usable, 1 / torch.where(usable, curvature, 1.0), 0.0)
        self._pairs = [*self._pairs[1 - _HISTORY :], (S, Y, SG, YG, inverse)]
        newest = curvature / torch.where(usable, square, 1.0)
        self._scale = torch.where(usable, newest, self._scale)

    def precondition(self, H: Tensor) -> Tensor:
        q, steps = H, []
        for _, Y, SG, _, inverse in reversed(self._pairs):
            along = inverse * _sum(SG * q)[..., None, None]
            q = q - along * Y
            steps.append(along)
        q = self._scale * q
        for (S, _, _, YG, inverse), along in zip(self._pairs, reversed(steps), strict=True):
            q = q + (along - inverse * _sum(YG * q)[..., None, None]) * S
        return q


def _lowest_point(quartic: Tensor) -> Tensor:
    """Return the t > 0 where a falling quartic [..., 5] is lowest.

    The roots of its derivative are 1 / s for the eigenvalues s of a companion matrix that is
    divided by the slope at 0, as the leading coefficients may vanish.
    """
    q = quartic.cpu()
    slope = torch.where(q[..., 1] < 0, q[..., 1], -1.0)
    companion = torch.zeros(*q.shape[:-1], 3, 3, dtype=q.dtype)
    companion[..., 0, :] = torch.stack([-k * q[..., k] / slope for k in (2, 3, 4)], dim=-1)
    companion[..., 1, 0] = companion[..., 2, 1] = 1.0
    s = torch.linalg.eigvals(companion).real
    t = torch.where(s > 1e-12, 1 / torch.where(s > 1e-12, s, 1.0), 0.0)
    values = _value(q[..., None, :], t)
    best: Tensor = t.gather(-1, values.argmin(-1, keepdim=True))[..., 0]
    return best.to(quartic.device)


def _armijo(quartic: Tensor, slope: Tensor, eta: Tensor) -> Tensor:
    for _ in range(_MOST_HALVINGS):
        high = _value(quartic, eta) > quartic[..., 0] - _ARMIJO * eta * slope
        if not bool(high.any()):
            break
        eta = torch.where(high, eta / 2, eta)
    return eta


def _value(quartic: Tensor, t: Tensor) -> Tensor:
    value = torch.zeros_like(t)
    for power in (4, 3, 2, 1, 0):
        value = value * t + quartic[..., power]
    return value


def _safe_rate(objective: _Objective) -> Tensor:
    largest = torch.linalg.eigvalsh(objective.G)[..., -1]
    overlap = torch.linalg.eigvalsh(objective.G * objective.off).abs().amax(-1)
    rate: Tensor = 1 / (4 * overlap + 8 * largest + 2 * objective.gamma)
    return rate


def _still_falling(before: Tensor, after: Tensor, tolerance: float) -> Tensor:
    return before - after >= _SETTLED * tolerance * before.abs()


def _identity(G: Tensor) -> Tensor:
    return torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G).clone()


def _sum(X: Tensor) -> Tensor:
    return X.sum(dim=(-2, -1))
