"""The mean of weights that differ by rotations of their input space: the base-free merge.

Every weight is written as one shared centre times a rotation of its own; the centre is returned.
How weights get here, and which of them are worth rotating, is decided elsewhere.

SLERP turns the flattened weight, one vector, within the plane that two of them span. This turns
the input space by one rotation that all rows share, in up to n/2 planes at once: for weights that
differ by a rotation the row norms, the angles between rows and the singular values all stay as
they are, of which SLERP keeps only the total norm. It takes any number of models; what is no
rotation is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg.checks import frobenius, require_finite
from orthomerge.linalg.logarithms import exp_so, principal_log
from orthomerge.linalg.means import weight_shares
from orthomerge.linalg.polar_factors import polar_factor
from orthomerge.linalg.precision import full_precision, working_dtype

__all__ = ["ProcrustesMeanReport", "procrustes_mean"]

_MARGIN = 0.01  # rad from pi within which the sense of a fitted rotation is taken for noise
_RAISES = 3  # times the anchor of a pair is raised tenfold before the pair is left unrotated


@dataclass(frozen=True, slots=True)
class ProcrustesMeanReport:
    """What one aligned mean did, in plain numbers.

    Attributes:
        sweeps: Refinement sweeps after the anchored start.
        converged: Whether the last sweep moved the centre by no more than rounding. Weights with
            directions of little energy often need more sweeps than they are given; the rest of
            the anchor's bias is then still in the result, on the side of less rotation.
        angles: Largest rotation angle of each R_i, in rad; 0 for a model of weight 0.
        rotational_share: For each model ``1 - ||W_i - C R_i||_F^2 / ||W_i - mean||_F^2`` with
            mean the weighted average: the part of its difference from the average that rotation
            explains. 1 is a pure rotation, 0 none; a single model may be worse off (below 0). 0
            where ``W_i = mean`` or the weight is 0. Noise alone explains a part too, about half
            for square weights.
        raised: Pairs (times blocks) whose anchor was raised since the fit was near a half turn
            or a reflection.
        unrotated: Those of them that stayed so and were given the identity.
        frozen: Blocks that were not refined, or not further: one of their anchors was raised, or a
            step came near a half turn or a reflection.
    """

    sweeps: int
    converged: bool
    angles: tuple[float, ...]
    rotational_share: tuple[float, ...]
    raised: int = 0
    unrotated: int = 0
    frozen: int = 0


@full_precision()
def procrustes_mean(
    Ws: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    anchor: float = 1e-3,
    block: int | None = None,
    max_sweeps: int = 10,
) -> tuple[torch.Tensor, ProcrustesMeanReport]:
    """Average weights after rotating their input spaces onto each other; no base is needed.

    Finds a centre C and rotations R_i with mean identity such that ``W_i ~ C R_i``, and returns
    ``C = sum_i w_i W_i R_i^T``; W_i, C [o, n], R_i [n, n].

    Pairs are fitted first, ``R_ij = polar(W_i^T W_j + lambda I)``, and
    ``R_i = exp(sum_j w_j log R_ji)``; two models are the ends of one geodesic. Sweeps then
    remove the anchor's bias, ``R <- polar(M + lambda R)`` with M of the pair for two models, of
    centre and model for more, where C and the frame (mean log zero) are renewed every time. Such
    proximal steps end at the unanchored fit where the weights determine one; what they do not
    determine, as the null space of a wide weight (o < n), stays at the identity.

    Laws: the order of the models does not matter; equal models come back bit for bit; without a
    rotation between them, as when all ``W_i^T W_j`` are symmetric and positive, C is the weighted
    average; ``W_2 = W_1 R`` of full column rank gives ``W_1 R^{w_2}``; ``W_i = C R_i`` gives C.

    Args:
        Ws: The T weights, one shape. All is computed in float64, in about 2 T copies.
        weights: T weights >= 0, normalised to sum 1 here; a weight of 0 leaves the model out.
        anchor: ``lambda = anchor sum_i w_i ||W_i||_F^2 / n``, positive. It keeps input directions
            with little energy from turning by what is noise.
        block: Rotate blocks of this many inputs apart, a divisor of n. The cost of one fit is
            about ``22 n block^2``; without it ``22 n^3``.
        max_sweeps: Most sweeps; 0 leaves the anchored start.

    Returns:
        C in float32 or float64, and the numbers behind it.

    Raises:
        NumericalError: Bad weights or settings, different shapes, or weights that are not finite.

    References:
        Gower, "Generalized Procrustes analysis" (1975); Rockafellar (1976) for proximal steps.

    >>> W = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> R = exp_so(torch.tensor([[0.0, 0.4], [-0.4, 0.0]]))
    >>> torch.allclose(procrustes_mean([W, W @ R @ R], [0.5, 0.5])[0], W @ R, atol=1e-6)
    True
    """
    _check(Ws, anchor, block, max_sweeps)
    shares = weight_shares(weights, len(Ws))
    used = [i for i, share in enumerate(shares) if share > 0]
    dtype, first = working_dtype(*Ws), require_finite(Ws[used[0]], "a weight")
    if all(torch.equal(Ws[i], first) for i in used):
        zeros = (0.0,) * len(Ws)
        return first.to(dtype, copy=True), ProcrustesMeanReport(0, True, zeros, zeros)
    size = block or first.shape[1]
    X = torch.stack([_blocks(require_finite(Ws[i], "a weight"), size) for i in used])
    fit = _Fit(X, [shares[i] for i in used], anchor, tolerance=_tolerance(dtype))
    converged = fit.refine(max_sweeps)
    C = fit.centre.transpose(0, 1).reshape(first.shape).to(dtype)
    return require_finite(C, "the mean"), _report(fit, converged, used, len(Ws))


class _Fit:
    """The rotations R [T, g, b, b] and centre [g, o, b] of weights X [T, g, o, b], g blocks."""

    def __init__(
        self, X: torch.Tensor, shares: list[float], anchor: float, tolerance: float
    ) -> None:
        self.X, self.shares, self.tolerance = X, shares, tolerance
        norms = frobenius(X.flatten(1, 2)).square().tolist()
        energy = math.fsum(share * norm for share, norm in zip(shares, norms, strict=True))
        self.scale = math.sqrt(energy)
        self.anchor = anchor * energy / (X.shape[1] * X.shape[3])
        self.sweeps = self.raised = self.unrotated = 0
        self.held = torch.zeros(X.shape[1], 1, 1, dtype=torch.bool, device=X.device)
        self.eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)

    def refine(self, max_sweeps: int) -> bool:
        """Start, then sweep until the centre rests; return whether it does."""
        pair = self.X.shape[0] == 2
        self._start()
        converged = self.scale == 0.0
        while not converged and self.sweeps < max_sweeps:
            before = self.centre
            self._sweep_pair() if pair else self._sweep_all()
            self.sweeps += 1
            change = float(torch.linalg.vector_norm(frobenius(self.centre - before)))
            converged = change <= self.tolerance * self.scale
        return converged

    def _start(self) -> None:
        count = self.X.shape[0]
        logs = torch.zeros(
            count, *self.X.shape[1:2], *self.eye.shape, dtype=self.X.dtype, device=self.X.device
        )
        for i in range(count):
            for j in range(i + 1, count):
                self.gram = self.X[i].mT @ self.X[j]  # of the last pair; for two, the only one
                self.pair, L = self._anchored(self.gram)
                logs[j].add_(L, alpha=self.shares[i])  # log R_ij pulls R_j, its negative R_i
                logs[i].sub_(L, alpha=self.shares[j])
        self._set_rotations(exp_so(logs))

    def _anchored(self, M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit one pair, M [g, b, b]; raise the anchor of blocks near a half turn, then give up."""
        anchors = M.new_full((M.shape[0], 1, 1), self.anchor)
        for attempt in range(_RAISES + 1):
            R, _ = polar_factor(M + anchors * self.eye, "svd")
            L, angle = principal_log(R)
            bad = (angle > math.pi - _MARGIN)[:, None, None]
            if not bool(bad.any()):
                return R, L
            if attempt == 0:
                self.raised += int(bad.sum())
                self.held = self.held | bad
            anchors = torch.where(bad, 10 * anchors, anchors)
        self.unrotated += int(bad.sum())
        return torch.where(bad, self.eye, R), torch.where(bad, 0.0, L)

    def _sweep_pair(self) -> None:
        """Take a proximal step of the one relative rotation; both ends follow."""
        self.pair = self._step(self.gram[None], self.pair[None])[0]
        L, _ = principal_log(self.pair)
        self._set_rotations(exp_so(torch.stack([-self.shares[1] * L, self.shares[0] * L])))

    def _sweep_all(self) -> None:
        """Fit every model to the centre, then turn the frame so that the mean log is zero."""
        R = self._step(self.centre.mT @ self.X, self.R)
        logs, _ = principal_log(R)
        frame = exp_so(_weighted(logs, self.shares))
        self._set_rotations(frame.mT @ R)

    def _step(self, M: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        """Return ``polar(M + lambda R)``, but R in blocks where one of them is near a half turn."""
        new, _ = polar_factor(M + self.anchor * R, "svd")
        bad = (principal_log(new)[1] > math.pi - _MARGIN).any(dim=0)[:, None, None]
        self.held = self.held | bad
        return torch.where(self.held, R, new)

    def _set_rotations(self, R: torch.Tensor) -> None:
        self.R = R
        self.centre = _weighted(self.X @ R.mT, self.shares)

    def angles(self) -> list[float]:
        """Return the largest angle of each model's rotation."""
        angles: list[float] = principal_log(self.R)[1].amax(dim=-1).tolist()
        return angles

    def rotational_shares(self) -> list[float]:
        """Return how much of each model's distance from the average rotation explains."""
        apart = frobenius((self.X - _weighted(self.X, self.shares)).flatten(1, 2)).square()
        left = frobenius((self.X - self.centre @ self.R).flatten(1, 2)).square()
        noise = (torch.finfo(self.X.dtype).eps * self.scale) ** 2
        shares: list[float] = torch.where(apart > noise, 1 - left / apart, 0.0).tolist()
        return shares


def _report(fit: _Fit, converged: bool, used: list[int], count: int) -> ProcrustesMeanReport:
    angles, rotational = [0.0] * count, [0.0] * count
    for i, angle, share in zip(used, fit.angles(), fit.rotational_shares(), strict=True):
        angles[i], rotational[i] = angle, share
    counts = (fit.raised, fit.unrotated, int(fit.held.sum()))
    return ProcrustesMeanReport(fit.sweeps, converged, tuple(angles), tuple(rotational), *counts)


def _weighted(X: torch.Tensor, shares: list[float]) -> torch.Tensor:
    total = torch.zeros_like(X[0])
    for part, share in zip(X, shares, strict=True):
        total.add_(part, alpha=share)
    return total


def _blocks(W: torch.Tensor, size: int) -> torch.Tensor:
    """Split the columns; [o, n] -> [n / size, o, size] in float64."""
    return W.double().reshape(W.shape[0], -1, size).transpose(0, 1)


def _tolerance(dtype: torch.dtype) -> float:
    return max(8 * torch.finfo(dtype).eps, 1e-14)


def _check(Ws: Sequence[torch.Tensor], anchor: float, block: int | None, max_sweeps: int) -> None:
    shapes = sorted({tuple(W.shape) for W in Ws})
    if len(shapes) != 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise NumericalError("the weights must be matrices of one shape", found=shapes)
    columns = shapes[0][1]
    divides = block is None or (block >= 1 and columns % block == 0)
    checks = (
        ("anchor", anchor, "positive and finite", 0 < anchor < math.inf),
        ("block", block, f"a divisor of {columns}", divides),
        ("max_sweeps", max_sweeps, "at least 0", max_sweeps >= 0),
    )
    for name, value, expected, right in checks:
        if not right:
            raise NumericalError(f"{name} is out of range", expected=expected, found=value)
