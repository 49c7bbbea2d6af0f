"""The small quadratic programs of retain projection: k coefficients from a k x k Gram matrix.

Everything here is float64 on the CPU and independent of how many parameters a model has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from orthomerge.errors import NumericalError, UnknownNameError

__all__ = ["ConeInfo", "solve_cone"]

ConeMode = Literal["hard", "cone"]
_EXCHANGES = 8
_Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class ConeInfo:
    """What a solve found; every tensor has the batch shape of the problem.

    Attributes:
        rank: Directions that the rows span after the eigenvalue cut-off.
        condition: Ratio of the largest to the smallest kept eigenvalue of the normalised Gram.
        active: Which rows have a coefficient that is not zero, [..., k].
        violation: Largest ``|b - K lam|`` (hard) or ``b - K lam`` above zero (cone), divided by
            the row's norm; 0 for a solved problem, up to rounding and the cut-off.
        converged: Whether the active-set method ended; always true for ``hard``.
    """

    rank: torch.Tensor
    condition: torch.Tensor
    active: torch.Tensor
    violation: torch.Tensor
    converged: torch.Tensor


def solve_cone(
    K: torch.Tensor,
    b: torch.Tensor,
    mode: ConeMode = "cone",
    *,
    rtol: float = 1e-7,
    floor: float = 0.0,
) -> tuple[torch.Tensor, ConeInfo]:
    """Find the smallest correction of an update that respects k linear constraints.

    With rows G = [g_1 .. g_k], K = G^T P G and b = G^T u, the corrected update ``u - P G lam`` is
    the nearest one (in P^-1) with ``r = b - K lam`` equal to 0 (``hard``) or with r <= 0, lam >= 0
    and lam^T r = 0 (``cone``). An offset c on a constraint, g_i^T u <= -c_i, is solved by b + c.

    Rows are normalised first, so that their scales do not matter, and eigenvalues of the
    normalised Gram below ``rtol`` times the largest count as zero: dependent and duplicate rows
    change nothing. A row of zeros gets the coefficient 0. Batches of cones are solved together by
    exchanging active rows; the active-set method of Lawson and Hanson solves what that leaves.

    Args:
        K: Gram matrices, [..., k, k], symmetric positive semi-definite.
        b: Products with the update, [..., k].
        mode: ``"hard"`` for equalities, ``"cone"`` for one-sided constraints.
        rtol: Eigenvalue cut-off.
        floor: Smallest coefficient in ``cone``; above 0 it is the margin of GEM, which biases the
            update towards decreasing the rows' losses.

    Returns:
        lam [..., k] in float64 on the CPU, and facts about the solve.

    Raises:
        UnknownNameError: ``mode`` is neither of the two.
        NumericalError: An input is not finite, or the shapes do not fit.

    References:
        Lawson and Hanson, Solving Least Squares Problems, chapter 23; GEM, arXiv:1706.08840.

    >>> lam, info = solve_cone(torch.eye(2) * 2, torch.tensor([-1.0, 4.0]))
    >>> lam.tolist(), info.rank.item()
    ([0.0, 2.0], 2)
    """
    K, b = _checked(K, b, mode)
    shape, size = b.shape, b.shape[-1]
    K, b = K.reshape(-1, size, size), b.reshape(-1, size)
    inverse = _inverse_norms(K)
    normal, target = K * inverse[:, :, None] * inverse[:, None, :], b * inverse
    vectors, values, kept = _spectrum(normal, rtol)
    if mode == "hard":
        y = _on_kept(
            vectors, torch.where(kept, 1 / values.where(kept, torch.ones(())), 0.0), target
        )
        converged = torch.ones(len(b), dtype=torch.bool)
    else:
        lowest = torch.where(inverse > 0, floor / inverse.where(inverse > 0, torch.ones(())), 0.0)
        y, converged = _one_sided(normal, target, lowest, vectors, values, kept)
    info = _described(normal, target, y, mode, converged, values, kept, shape)
    return (y * inverse).reshape(shape), info


def _checked(K: torch.Tensor, b: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and b in float64 on the CPU, or refuse them."""
    if mode not in ("hard", "cone"):
        raise UnknownNameError("mode", mode, ["hard", "cone"])
    K, b = K.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)
    if K.shape != (*b.shape, b.shape[-1]):
        raise NumericalError(
            "K and b do not fit",
            expected="K [..., k, k], b [..., k]",
            found=f"{tuple(K.shape)}, {tuple(b.shape)}",
        )
    if not bool(torch.isfinite(K).all() and torch.isfinite(b).all()):
        raise NumericalError(
            "a product of rows is not finite", remedy="Leave out rows with NaN or infinite entries."
        )
    return K, b


def _described(
    normal: torch.Tensor,
    target: torch.Tensor,
    y: torch.Tensor,
    mode: str,
    converged: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    shape: torch.Size,
) -> ConeInfo:
    residual = target - (normal @ y[..., None])[..., 0]
    return ConeInfo(
        rank=kept.sum(-1).reshape(shape[:-1]),
        condition=_condition(values, kept).reshape(shape[:-1]),
        active=(y != 0).reshape(shape),
        violation=_largest(residual.abs() if mode == "hard" else residual).reshape(shape[:-1]),
        converged=converged.reshape(shape[:-1]),
    )


def _inverse_norms(K: torch.Tensor) -> torch.Tensor:
    """Return ``1 / ||g_i||``, and 0 for rows of zeros; [B, k]."""
    norms = K.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return torch.where(norms > 0, 1 / norms.where(norms > 0, torch.ones(())), 0.0)


def _spectrum(normal: torch.Tensor, rtol: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return eigenvectors, eigenvalues and which of them count."""
    if normal.shape[-1] == 0:
        empty = normal.new_zeros(normal.shape[:-1])
        return normal, empty, empty > 0
    values, vectors = torch.linalg.eigh((normal + normal.mT) / 2)
    largest = values[..., -1:]
    return vectors, values, (values > rtol * largest) & (largest > 0)


def _on_kept(vectors: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ``V diag(weights) V^T x`` for a batch of vectors x [B, k]."""
    return (vectors @ (weights[..., None] * (vectors.mT @ x[..., None])))[..., 0]


def _condition(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    if values.shape[-1] == 0:
        return values.new_ones(values.shape[:-1])
    smallest = values.where(kept, torch.full((), torch.inf, dtype=values.dtype)).amin(-1)
    return torch.where(kept.any(-1), values[..., -1] / smallest, 1.0)


def _largest(residual: torch.Tensor) -> torch.Tensor:
    if residual.shape[-1] == 0:
        return residual.new_zeros(residual.shape[:-1])
    return residual.amax(-1).clamp(min=0)


def _one_sided(
    normal: torch.Tensor,
    target: torch.Tensor,
    lowest: torch.Tensor,
    vectors: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve every problem of the batch; those that are safe as they are cost nothing."""
    shifted = target - (normal @ lowest[..., None])[..., 0]
    y = lowest.clone()
    converged = torch.ones(len(target), dtype=torch.bool)
    unsafe = (shifted > 0).any(-1)
    together = (unsafe & kept.all(-1)).nonzero()[:, 0]
    found, settled = _exchange(normal[together], shifted[together])
    y[together[settled]] += found[settled]
    unsafe[together[settled]] = False
    for index in unsafe.nonzero()[:, 0].tolist():
        K, b, whole = normal[index], shifted[index], bool(kept[index].all())
        if not whole:  # what the cut-off calls zero must not be solved for
            V = vectors[index][:, kept[index]]
            K, b = (V * values[index][kept[index]]) @ V.mT, V @ (V.mT @ b)
        solution, done = _nonnegative(K.numpy(), b.numpy(), whole)
        y[index] += torch.from_numpy(solution)
        converged[index] = done
    return y, converged


def _exchange(K: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Guess the active rows of many definite problems at once, exchanging all wrong ones.

    Most problems settle in a few exchanges; a settled one meets the optimality conditions, and a
    definite problem has one optimum. The others are left to the method that always ends.
    """
    passive = b > 0
    y, settled = torch.zeros_like(b), torch.zeros(len(b), dtype=torch.bool)
    identity = torch.eye(b.shape[-1], dtype=b.dtype)
    slack = 1e-12 * b.abs().amax(-1, keepdim=True) if b.numel() else b
    for _ in range(_EXCHANGES if b.numel() else 0):
        both = passive[:, :, None] & passive[:, None, :]
        part = K.where(both, torch.zeros(()).double()) + identity * ~passive[:, None, :]
        y = torch.linalg.solve(part, b.where(passive, torch.zeros(()).double()))
        slope = b - (K @ y[..., None])[..., 0]
        wanted = (passive & (y > 0)) | (~passive & (slope > slack))
        settled = (wanted == passive).all(-1)
        if bool(settled.all()):
            break
        passive = wanted.where(~settled[:, None], passive)
    return y, settled


def _nonnegative(K: _Array, b: _Array, definite: bool) -> tuple[_Array, bool]:
    """Minimise ``y^T K y / 2 - b^T y`` over y >= 0; return y and whether the method ended."""
    size = len(b)
    y: _Array = np.zeros(size)
    passive, barred = np.zeros(size, bool), np.zeros(size, bool)
    scale = float(np.abs(b).max())
    for _ in range(8 * size + 8):
        slope = b - K @ y
        tolerance = 1e-12 * scale + 1e-15 * size * float(np.abs(y).sum())
        open_rows = (slope > tolerance) & ~passive & ~barred
        if not open_rows.any():
            return y, True
        entering = int(np.argmax(np.where(open_rows, slope, -np.inf)))
        passive[entering] = True
        z = _on_passive(K, b, passive, definite)
        if z[entering] <= 0:  # a direction the passive rows span already
            passive[entering], barred[entering] = False, True
            continue
        barred[:] = False
        y = _retreat(K, b, y, z, passive, definite)
    return y, False


def _retreat(
    K: _Array, b: _Array, y: _Array, z: _Array, passive: np.ndarray, definite: bool
) -> _Array:
    """Move from y to the solution z on the passive rows, dropping those that turn negative."""
    while bool((passive & (z <= 0)).any()):
        bad = np.flatnonzero(passive & (z <= 0))
        gap = y[bad] - z[bad]
        ratios = np.where(gap > 0, y[bad] / np.where(gap > 0, gap, 1.0), 0.0)
        y = y + ratios.min() * (z - y)
        passive[bad[ratios <= ratios.min()]] = False
        y[~passive] = 0.0
        z = _on_passive(K, b, passive, definite)
    return z


def _on_passive(K: _Array, b: _Array, passive: np.ndarray, definite: bool) -> _Array:
    z: _Array = np.zeros(len(b))
    rows = np.flatnonzero(passive)
    part = K[np.ix_(rows, rows)]
    if len(rows) and definite:
        z[rows] = np.linalg.solve(part, b[rows])
    elif len(rows):
        z[rows] = np.linalg.lstsq(part, b[rows], rcond=1e-12)[0]
    return z
