"""The reference recipe of orthogonal–residual decoupling, in plain numpy at double precision.

Written from the formulas, one dict of arrays per model; nothing here comes from the library.
"""

from __future__ import annotations

import math

import numpy as np

Model = dict[str, np.ndarray]


def targets(W0: np.ndarray, experts: list[np.ndarray], variant: str) -> list[np.ndarray]:
    """G: the experts. C: the base plus the rows that oppose the mean change."""
    if variant == "global":
        return list(experts)
    deltas = [W - W0 for W in experts]
    mean = sum(deltas) / len(deltas)
    out = []
    for D in deltas:
        conflict = (D * mean).sum(axis=1) < 0  # the sign of the cosine
        out.append(W0 + conflict[:, None] * D)
    return out


def conflict_rows(W0: np.ndarray, experts: list[np.ndarray]) -> list[int]:
    """How many rows of each expert oppose the mean change."""
    return [int((X != W0).any(axis=1).sum()) for X in targets(W0, experts, "conflict-aware")]


def procrustes(W0: np.ndarray, X: np.ndarray) -> np.ndarray:
    """argmin over orthogonal R of ‖W0 R − X‖, by one full SVD."""
    U, _, Vh = np.linalg.svd(W0.T @ X)
    return U @ Vh


def inverse_cayley(R: np.ndarray) -> np.ndarray:
    """(R + I)⁻¹ (R − I), its skew part."""
    eye = np.eye(len(R))
    A = np.linalg.solve(R + eye, R - eye)
    return (A - A.T) / 2


def cayley(A: np.ndarray) -> np.ndarray:
    """(I − A)⁻¹ (I + A)."""
    eye = np.eye(len(A))
    return np.linalg.solve(eye - A, eye + A)


def corrected_mean(generators: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """The sum, scaled to the mean Frobenius norm; and the scale times T."""
    S = sum(generators)
    norm = np.linalg.norm(S)
    if norm < 1e-8:
        return np.zeros_like(S), 0.0
    c = sum(np.linalg.norm(A) for A in generators) / norm
    return c / len(generators) * S, c


def is_rotated(name: str, weight: np.ndarray) -> bool:
    return weight.ndim == 2 and "weight" in name and "layernorm" not in name


def decouple(W0: np.ndarray, experts: list[np.ndarray], variant: str) -> dict:
    """Everything the recipe computes for one matrix, before the residuals are merged."""
    found = [procrustes(W0, X) for X in targets(W0, experts, variant)]
    generators = [inverse_cayley(R) for R in found]
    merged, c = corrected_mean(generators)
    # The residual is the whole expert's, with the rotation the generator stands for.
    residuals = [W - W0 @ cayley(A) for W, A in zip(experts, generators, strict=True)]
    R_m = cayley(merged)
    return {
        "generators": generators,
        "merged": merged,
        "c": c,
        "R_m": R_m,
        "rotated": W0 @ R_m,
        "residuals": residuals,
    }


def sum_merge(residuals: list[Model], scale: float) -> Model:
    return {name: scale * sum(r[name] for r in residuals) for name in residuals[0]}


def ties_merge(residuals: list[Model], keep: float, scale: float) -> Model:
    """Trim, elect and merge over each model's values laid end to end."""
    names = list(residuals[0])
    flat = np.stack([np.concatenate([r[n].ravel() for n in names]) for r in residuals])
    kept = np.zeros_like(flat)
    for row, values in enumerate(flat):
        k = int(values.size * (1 - keep))
        # k-th smallest, counted from one; everything at least as large stays
        threshold = np.sort(np.abs(values))[max(k, 1) - 1]
        kept[row] = np.where(np.abs(values) >= threshold, values, 0.0)
    elected = np.where(kept.sum(axis=0) < 0, -1.0, 1.0)
    agree = np.where(elected > 0, kept > 0, kept < 0)
    count = agree.sum(axis=0)
    merged = scale * (kept * agree).sum(axis=0) / np.maximum(count, 1)
    out, start = {}, 0
    for name in names:
        shape = residuals[0][name].shape
        size = math.prod(shape)
        out[name] = merged[start : start + size].reshape(shape)
        start += size
    return out


def polar(M: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    return U @ Vh


def tsv_matrix(matrices: list[np.ndarray]) -> np.ndarray:
    """Leading singular triples of each, the frames replaced by their polar factors."""
    left, values, right = [], [], []
    for M in matrices:
        U, s, Vh = np.linalg.svd(M, full_matrices=False)
        kept = max(1, int(len(s) / len(matrices)))
        left.append(U[:, :kept])
        values.append(s[:kept])
        right.append(Vh[:kept].T)
    U, V = polar(np.concatenate(left, axis=1)), polar(np.concatenate(right, axis=1))
    return (U * np.concatenate(values)) @ V.T


def tsv_merge(residuals: list[Model], scale: float) -> Model:
    out = {}
    for name, first in residuals[0].items():
        values = [r[name] for r in residuals]
        merged = tsv_matrix(values) if first.ndim == 2 else sum(values) / len(values)
        out[name] = scale * merged
    return out


def merge_models(base: Model, experts: list[Model], variant: str, residual) -> dict:
    """The whole recipe: base rotated, plus the merged residuals."""
    rotated, residuals, layers = {}, [{} for _ in experts], {}
    for name, W0 in base.items():
        own = [expert[name] for expert in experts]
        if is_rotated(name, W0):
            layers[name] = decouple(W0, own, variant)
            rotated[name] = layers[name]["rotated"]
            parts = layers[name]["residuals"]
        else:
            rotated[name] = W0
            parts = [W - W0 for W in own]
        for model, part in zip(residuals, parts, strict=True):
            model[name] = part
    merged = residual(residuals)
    tensors = {name: rotated[name] + merged[name] for name in base}
    return {"tensors": tensors, "layers": layers, "residuals": residuals, "merged": merged}
