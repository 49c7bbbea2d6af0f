"""Isotropic updates of one matrix: singular directions of a sum and of tasks, all equally strong.

Which directions a method takes is its own business; shapes other than matrices are ``matrices``'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthomerge.linalg.lowrank import leading_directions, orthonormal_frame
from orthomerge.linalg.polar_iterations import newton_schulz

__all__ = ["Directions", "common_directions", "flat_spectrum", "own_directions"]

# Weaker directions are rounding noise: at the mean strength they would be as loud as all others.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class Directions:
    """Singular triples in float64, the strongest first.

    Args:
        U: Left vectors [o, r].
        S: Singular values [r].
        V: Right vectors [n, r].
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def leading(self, count: int) -> Directions:
        """Return the strongest of them."""
        return Directions(self.U[:, :count], self.S[:count], self.V[:, :count])


def common_directions(deltas: Sequence[Tensor], weights: Sequence[float]) -> Directions:
    """Return the directions of ``Σ w_i D_i`` that are stronger than 1e-6 of its strongest."""
    total = weights[0] * deltas[0].double()
    for weight, delta in zip(weights[1:], deltas[1:], strict=True):
        total.add_(delta, alpha=weight)
    found = Directions(*leading_directions(total, min(total.shape)))
    return found.leading(int(found.S.gt(_NEGLIGIBLE * found.S[:1]).sum()))


def own_directions(task: Tensor, common: Directions, count: int) -> Directions:
    """Return the leading directions of ``(I - U_c U_c^T) w D``, what the common ones leave of it.

    Directions that are weaker than 1e-6 of the whole task, not only of what is left, stay out.

    Args:
        task: w D in float64.
        common: The directions to leave out.
        count: Most directions to return.
    """
    found = Directions(*leading_directions(task - common.U @ (common.U.mT @ task), count))
    return found.leading(int(found.S.gt(_NEGLIGIBLE * torch.linalg.matrix_norm(task)).sum()))


def flat_spectrum(parts: Sequence[Directions], like: Tensor) -> Tensor:
    """Return ``mean(S) polar([U_1 …]) polar([V_1 …])^T`` over all parts, in float64.

    Args:
        parts: Singular triples, none or more in each.
        like: Gives the shape of a result without directions: zeros.

    >>> e = torch.eye(2, dtype=torch.float64)
    >>> flat_spectrum([Directions(e, torch.tensor([3.0, 1.0]).double(), e)], e)
    tensor([[2., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    S = torch.cat([part.S for part in parts])
    if not len(S):
        return torch.zeros_like(like, dtype=torch.float64)
    return S.mean() * _frame([part.U for part in parts]) @ _frame([part.V for part in parts]).mT


def _frame(blocks: Sequence[Tensor]) -> Tensor:
    """Return the orthonormal frame nearest to the blocks side by side.

    Vectors of one decomposition are orthonormal but for the weakest, which the Gram matrix resolves
    to about (1e-8 s_1 / s)^2; one step removes that. Several blocks need the polar factor.
    """
    filled = [block for block in blocks if block.shape[1]]
    return newton_schulz(filled[0]) if len(filled) == 1 else orthonormal_frame(filled)
