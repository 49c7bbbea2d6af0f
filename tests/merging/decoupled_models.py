"""Weights with a given spectrum, changes of them, and an independent account of the merge."""

from __future__ import annotations

import math

import numpy as np
import torch

from orthomerge import merge

NAME = "layers.0.up.weight"
FP64 = {"compute_dtype": "float64"}
MODES = ("faithful", "robust")
ANCHORS = {"faithful": 1e-6, "robust": 1e-3}
ROTATION_ONLY = {"method": "task-arithmetic", "scale": 0.0}


def run(base, experts, *, name=NAME, dtype=torch.float64, **given_settings):
    """Merge single tensors; return the result."""
    return merge(
        [{name: torch.as_tensor(W).to(dtype)} for W in experts],
        base={name: torch.as_tensor(base).to(dtype)},
        **{
            "method": "orthomerge-decoupled",
            "gate": "off",
            "mode": "faithful",
            "run_settings": FP64,
            **given_settings,
        },
    )


def merged(base, experts, *, name=NAME, **given_settings) -> np.ndarray:
    return run(base, experts, name=name, **given_settings).tensors[name].double().numpy()


def facts_of(base, experts, *, name=NAME, **given_settings) -> dict:
    return run(base, experts, name=name, **given_settings).details[name]["facts"]


def mean_of(count: int) -> dict:
    return {"method": "task-arithmetic", "scale": 1 / count}


def weight(o: int, n: int, kappa: float, seed: int) -> np.ndarray:
    """A matrix with singular values from 1 to 1 / kappa between random frames."""
    rng = np.random.default_rng(seed)
    k = min(o, n)
    U, V = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (o, n))
    return (U * np.geomspace(1, 1 / kappa, k)) @ V.T


def noisy(base: np.ndarray, count: int, size: float, seed: int) -> list[np.ndarray]:
    """The base with changes of ``size`` times its norm."""
    rng = np.random.default_rng(seed)
    changes = [rng.standard_normal(base.shape) for _ in range(count)]
    return [base + size * np.linalg.norm(base) / np.linalg.norm(D) * D for D in changes]


def skew(n: int, largest: float, seed: int) -> np.ndarray:
    G = np.random.default_rng(seed).standard_normal((n, n))
    return largest * (G - G.T) / np.linalg.norm(G - G.T, 2)


def orthogonal(n: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


# An independent account of the whole merge, with the anchor.


def fitted(W0, X, anchor):
    n = W0.shape[1]
    U, _, Vh = np.linalg.svd(W0.T @ X + anchor * (W0**2).sum() / n * np.eye(n))
    return U @ Vh


def inverse_cayley(R):
    eye = np.eye(len(R))
    return eye - 2 * np.linalg.inv(R + eye)


def cayley(A):
    eye = np.eye(len(A))
    return 2 * np.linalg.inv(eye - A) - eye


def split_oracle(W0, experts, anchor):
    """Return generators and residuals."""
    found = [fitted(W0, W, anchor) for W in experts]
    residuals = [W - W0 @ R for W, R in zip(experts, found, strict=True)]
    return [inverse_cayley(R) for R in found], residuals


def corrected(generators, weights, c_max=math.inf):
    shares = np.array(weights) / np.sum(weights)
    S = sum(w * A for w, A in zip(shares, generators, strict=True))
    m = sum(w * np.linalg.norm(A) for w, A in zip(shares, generators, strict=True))
    return min(m / np.linalg.norm(S), c_max) * S


def big(o: int = 48, n: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((o, n)) / math.sqrt(n)
