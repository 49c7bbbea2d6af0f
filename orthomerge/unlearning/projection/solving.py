"""From products per tensor to coefficients per tensor, with tensors grouped as asked.

A group of tensors shares one set of coefficients; which tensors form a group is decided in scopes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthomerge.unlearning.projection.cones import ConeInfo, ConeMode, solve_cone

__all__ = ["Grouped", "effective_rank", "grouped", "signed_coefficients", "solve_groups"]


@dataclass(frozen=True, slots=True)
class Grouped:
    """Products summed over the tensors of each group.

    Attributes:
        K: Gram matrices of the k rows, [groups, k, k].
        b: Products of the rows with the vector to correct, [groups, k].
        norms: Squared norms of that vector, [groups].
    """

    K: torch.Tensor
    b: torch.Tensor
    norms: torch.Tensor

    @property
    def cosines(self) -> torch.Tensor:
        """Cosine of every row with the vector, [groups, k]; 0 where either is zero."""
        scales = (self.K.diagonal(dim1=-2, dim2=-1) * self.norms[:, None]).clamp(min=0).sqrt()
        return torch.where(scales > 0, self.b / scales.where(scales > 0, torch.ones(())), 0.0)

    def total(self) -> Grouped:
        """Return the same over all groups, as one."""
        return Grouped(self.K.sum(0)[None], self.b.sum(0)[None], self.norms.sum()[None])


def grouped(K: torch.Tensor, b: torch.Tensor, norms: torch.Tensor, groups: torch.Tensor) -> Grouped:
    """Sum products of single tensors, [tensors, ...], over the groups they belong to."""
    count = int(groups.max()) + 1 if len(groups) else 0

    def total(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros((count, *values.shape[1:])).index_add_(0, groups, values)

    return Grouped(total(K), total(b), total(norms))


def solve_groups(
    problem: Grouped,
    mode: ConeMode,
    *,
    rtol: float,
    ascent: bool = False,
    floor: float = 0.0,
) -> tuple[torch.Tensor, ConeInfo]:
    """Return one set of coefficients per group, [groups, k]: subtract ``P G lam``.

    ``ascent`` says what a cone forbids. An update must not have a positive product with a row
    (False); a gradient, which the optimizer subtracts, must not have a negative one (True).
    """
    sign = -1.0 if ascent else 1.0
    lam, info = solve_cone(problem.K, sign * problem.b, mode, rtol=rtol, floor=floor)
    return sign * lam, info


def effective_rank(info: ConeInfo) -> float:
    """Return the mean rank over the groups that have one."""
    ranks = info.rank[info.rank > 0].double()
    return float(ranks.mean()) if len(ranks) else 0.0


def signed_coefficients(
    problem: Grouped,
    retain: torch.Tensor,
    *,
    rtol: float,
    threshold: float = 0.0,
    keep: float = 0.5,
) -> torch.Tensor:
    """Return the coefficients of the sign-aware rule: tangent parts that help the retain loss stay.

    With Q the Gram-Schmidt basis of the rows in their order, a = Q^T f and c = Q^T r, components
    with ``a_i c_i > threshold`` are put back, scaled by ``min(1, keep ||f_perp|| / ||t||)``. The
    result depends on the order of the rows and is at most as good as the cone; it exists for
    comparisons with the rule's authors only.

    Args:
        problem: Products with the forget gradient f.
        retain: Products of the rows with the retain gradient r, [groups, k].
        rtol: Squared share of a row outside the earlier ones below which it is left out.
        threshold: The rule's tau.
        keep: The rule's kappa.
    """
    rows = zip(problem.K, problem.b, problem.norms, retain, strict=True)
    return torch.stack([_signed(K, b, n, r, rtol, threshold, keep) for K, b, n, r in rows])


def _signed(
    K: torch.Tensor,
    b: torch.Tensor,
    norm: torch.Tensor,
    retain: torch.Tensor,
    rtol: float,
    threshold: float,
    keep: float,
) -> torch.Tensor:
    basis = _gram_schmidt(K, rtol)  # Q = G basis
    a, c = basis.mT @ b, basis.mT @ retain
    kept = torch.where(a * c > threshold, a, 0.0)
    normal = (norm - a.square().sum()).clamp(min=0).sqrt()
    length = torch.linalg.vector_norm(kept)
    scale = min(1.0, float(keep * normal / length)) if length > 0 else 0.0
    return basis @ (a - scale * kept)


def _gram_schmidt(K: torch.Tensor, rtol: float) -> torch.Tensor:
    """Return coefficients [k, m] of an orthonormal basis of the rows, in their order."""
    columns: list[torch.Tensor] = []
    for index in range(len(K)):
        column = torch.zeros(len(K), dtype=K.dtype)
        column[index] = 1.0
        for _ in range(2):  # once more, against the loss of orthogonality
            for earlier in columns:
                column = column - (earlier @ K @ column) * earlier
        length = column @ K @ column
        if length > rtol * K[index, index]:
            columns.append(column / length.sqrt())
    return torch.stack(columns, dim=1) if columns else K.new_zeros(len(K), 0)
