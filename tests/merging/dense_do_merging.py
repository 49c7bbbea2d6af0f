"""DO-Merging written out on dense matrices in numpy: what the factored one is measured against."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize


def split(stack, sizes):
    return np.split(stack, np.cumsum(sizes)[:-1])


def power(S, exponent):
    """A power of a symmetric matrix on its range."""
    values, vectors = np.linalg.eigh(S)
    kept = values > 1e-12 * max(values.max(), 1e-300)
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


def balanced(B, A):
    U, s, Vh = np.linalg.svd(B @ A, full_matrices=False)
    r = int((s > 1e-9 * s[0]).sum())
    return U[:, :r] * np.sqrt(s[:r]), np.sqrt(s[:r])[:, None] * Vh[:r]


def inside(sizes):
    ids = np.repeat(np.arange(len(sizes)), sizes)
    return ids[:, None] == ids


def loss(V, W, sizes, gamma):
    K = np.where(inside(sizes), 0.0, V @ V.T)
    return (K**2).sum() + gamma * ((V - W) ** 2).sum(), 4 * K @ V + 2 * gamma * (V - W)


def orthogonal(W, sizes, how, gamma=1.0, normalise=True, steps=100):
    """The stack V [R, d] made of W, written on the stack itself."""
    unit = np.sqrt((W**2).sum() / len(W)) if normalise else 1.0
    W = W / unit
    if how == "lowdin":
        D = np.where(inside(sizes), W @ W.T, 0.0)
        white = power(D, -0.5) @ W
        V = power(D, 0.5) @ power(white @ white.T, -0.5) @ white
    elif how == "ridge" and len(sizes) > 1:
        V = []
        for i, part in enumerate(split(W, sizes)):
            M = np.concatenate([p for j, p in enumerate(split(W, sizes)) if j != i])
            V.append(part - part @ M.T @ np.linalg.inv(gamma / 2 * np.eye(len(M)) + M @ M.T) @ M)
        V = np.concatenate(V)
    elif how == "lbfgs":
        flat = minimize(
            lambda x: tuple(np.ravel(v)[()] for v in loss(x.reshape(W.shape), W, sizes, gamma)),
            W.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-11},
        )
        V = flat.x.reshape(W.shape)
    elif how == "adam":
        V, m, v = W.copy(), 0.0, 0.0
        for t in range(1, steps + 1):
            g = loss(V, W, sizes, gamma)[1]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            V = V - 0.01 * np.sqrt((W**2).mean()) * step
    else:
        V = W
    return V * unit


def mean_of(alphas, weights, present, how="mean"):
    """ᾱ of one column."""
    w = np.abs(np.asarray(weights)) * present
    if w.sum() == 0:
        return 0.0
    if how == "median":
        points = sorted((a, x) for a, x in zip(alphas, w, strict=True) if x > 0)
        c = np.cumsum([x for _, x in points]) / w.sum()
        low = next(a for (a, _), x in zip(points, c, strict=True) if x >= 0.5 - 1e-12)
        high = next(a for (a, _), x in zip(points, c, strict=True) if x > 0.5 + 1e-12)
        return (low + high) / 2
    return {
        "mean": lambda: (w * alphas).sum() / w.sum(),
        "sum": lambda: (w * alphas).sum(),
        "rms": lambda: np.sqrt((w * alphas**2).sum() / w.sum()),
        "max": lambda: alphas[w > 0].max(),
        "geomean": lambda: np.prod(np.where(w > 0, alphas, 1.0) ** (w / w.sum())),
    }[how]()


def merge(
    pairs,
    weights=None,
    *,
    how="none",
    sides="BA",
    gauge="balanced",
    gamma=1.0,
    normalise=True,
    steps=100,
    p=0.0,
    axis="in",
    magnitude="mean",
    source="original",
    zeros="exclude",
    cap=10.0,
    renormalise=False,
    scale=1.0,
):
    """The merged dense update, and λ."""
    weights = weights or [1.0] * len(pairs)
    live = [(w, B, A) for w, (B, A) in zip(weights, pairs, strict=True) if w and (B @ A).any()]
    weights = [w for w, _, _ in live]
    factors = [balanced(B, A) if gauge == "balanced" else (B, A) for _, B, A in live]
    before = [B @ A for B, A in factors]
    sizes = [A.shape[0] for _, A in factors]
    left = np.concatenate([B.T for B, _ in factors])
    right = np.concatenate([A for _, A in factors])
    options = {"gamma": gamma, "normalise": normalise, "steps": steps}
    left = orthogonal(left, sizes, how, **options) if "B" in sides else left
    right = orthogonal(right, sizes, how, **options) if "A" in sides else right
    after = [B.T @ A for B, A in zip(split(left, sizes), split(right, sizes), strict=True)]
    norms = [np.linalg.norm(D) for D in before]
    if axis == "out":
        before, after = [D.T for D in before], [D.T for D in after]
    if p or renormalise:
        merged = decoupled(before, after, weights, p, magnitude, source, zeros, cap, renormalise)
    else:
        merged = sum(w * D for w, D in zip(weights, after, strict=True))
    merged = merged.T if axis == "out" else merged
    if scale == "auto":
        w = np.abs(weights)
        target = (w * norms).sum() / w.sum()
        scale = float(np.clip(target / np.linalg.norm(merged), 1 / len(live), 2.0))
    return scale * merged, scale


def decoupled(before, after, weights, p, magnitude, source, zeros, cap, renormalise):
    own = np.array([np.linalg.norm(D, axis=0) for D in after])
    origin = np.array([np.linalg.norm(D, axis=0) for D in before])
    alphas = origin if source == "original" else own
    present = alphas > 1e-8 * np.sqrt((alphas**2).mean(1, keepdims=True))
    merged = np.zeros_like(after[0])
    for j in range(merged.shape[1]):
        counted = present[:, j] if zeros == "exclude" else np.ones(len(after), bool)
        mean = mean_of(alphas[:, j], weights, counted, magnitude)
        column = np.zeros(len(merged))
        for i, D in enumerate(after):
            if present[i, j] and own[i, j] > 0:
                column += weights[i] * D[:, j] / max(own[i, j], origin[i, j] / cap) ** p
        length = np.linalg.norm(column)
        if renormalise:
            column = column / length * mean if length > 1e-9 else 0 * column
        else:
            column = column * mean**p
        merged[:, j] = column
    return merged
