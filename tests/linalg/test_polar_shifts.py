"""Polar factors by shifted inverses: the rational function, the matrix, when it is not taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from orthomerge.linalg import ProcrustesBase, procrustes_right
from orthomerge.linalg import procrustes_subspaces as subspaces
from orthomerge.linalg.polar_shifts import _spd_inverse, inverse_root_shifts, shifted_polar


def polar(M: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(M)
    return U @ Vh


def layer(o: int, n: int, kappa: float, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return a float32 base of condition ``kappa`` and a weight ``fraction`` away from it."""
    rs = np.random.RandomState(seed)
    U = np.linalg.qr(rs.standard_normal((o, o)))[0]
    V = np.linalg.qr(rs.standard_normal((n, o)))[0]
    W0 = (U * np.geomspace(1, 1 / kappa, o)) @ V.T
    D = rs.standard_normal((o, n))
    D *= fraction * np.linalg.norm(W0) / np.linalg.norm(D)
    return torch.from_numpy(W0).float(), torch.from_numpy(W0 + D).float()


def oracle(W0: Tensor, X: Tensor, anchor: float) -> np.ndarray:
    """The dense solution in float64, from its formula."""
    W, Y = W0.double().numpy(), X.double().numpy()
    n = W.shape[1]
    return polar(W.T @ Y + anchor * np.linalg.norm(W) ** 2 / n * np.eye(n))


def far_from(R: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(R - exact) / np.linalg.norm(exact - np.eye(len(exact))))


@pytest.mark.parametrize("high", [2.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("count", [6, 12, 24])
def test_the_shifts_are_as_good_as_promised(high, count) -> None:
    s = np.geomspace(1.0, high, 4001)
    total = sum(w / (s**2 + t) for t, w in inverse_root_shifts(1.0, high, count))
    promised = 4 * math.exp(-2 * math.pi**2 * count / (2 * math.log(high) + 3))
    assert np.abs(total * s - 1).max() < 1.1 * promised + 1e-13


@pytest.mark.parametrize("shape", [(12, 12), (12, 5), (5, 12), (1, 1), (300, 40)])
@pytest.mark.parametrize("corner", [1e-3, 1.0])
def test_the_matrix_is_the_polar_factor(shape, corner) -> None:
    o, m = shape
    rs = np.random.RandomState(o + m)
    C = np.eye(o) * (1 + corner) + rs.standard_normal((o, o)) / (3 * math.sqrt(o))
    B = 0.1 * rs.standard_normal((o, m))
    N = np.block([[C, B], [np.zeros((m, o)), corner * np.eye(m)]])
    R = shifted_polar(torch.from_numpy(C), torch.from_numpy(B), corner, torch.float64)
    assert R is not None
    assert np.abs(R.numpy() - polar(N)).max() < 2e-7
    assert np.linalg.norm(R.numpy().T @ R.numpy() - np.eye(o + m)) < 1e-6


@pytest.mark.parametrize("fault", ["singular", "corner", "not finite"])
def test_what_is_too_singular_is_left_to_others(fault) -> None:
    C, B, corner = torch.eye(6).double(), torch.ones(6, 6).double() / 9, 1e-2
    if fault == "singular":
        C[2] = 0
    elif fault == "corner":
        corner = 1e-7
    else:
        C[0, 0] = math.nan
    assert shifted_polar(C, B, corner, torch.float32) is None


@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_inverses_by_halves(n) -> None:
    A = torch.from_numpy(np.random.RandomState(n).standard_normal((n, n)))
    G = A @ A.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
    assert np.abs(_spd_inverse(G).numpy() @ G.numpy() - np.eye(n)).max() < 1e-10


@pytest.mark.parametrize("anchor", [1e-3, 1e-2])
@pytest.mark.parametrize(("kappa", "fraction"), [(1.0, 0.02), (100.0, 0.02), (10.0, 0.3)])
def test_fits_of_wide_layers_take_it_and_are_exact(anchor, kappa, fraction) -> None:
    W0, X = layer(200, 450, kappa, fraction, 1)
    fit = procrustes_right(W0, X, anchor=anchor)
    assert (fit.report.method, fit.report.fallbacks) == ("shifts", 0)
    exact, R = oracle(W0, X, anchor), fit.rotation().double().numpy()
    assert far_from(R, exact) < 2e-5
    assert np.linalg.norm(R.T @ R - np.eye(450)) / math.sqrt(450) < 1e-6
    A = np.linalg.solve(exact + np.eye(450), exact - np.eye(450))
    assert np.linalg.norm(fit.generator().double().numpy() - A) / np.linalg.norm(A) < 5e-5
    turned = W0.double().numpy() @ exact
    assert fit.rotated is not None
    moved = np.linalg.norm(turned - W0.double().numpy())
    assert np.linalg.norm(fit.rotated.double().numpy() - turned) < 1e-4 * moved
    assert fit.residual == pytest.approx(np.linalg.norm(turned - X.double().numpy()), rel=1e-5)


def test_ill_conditioned_layers_fall_back_and_stay_exact() -> None:
    W0, X = layer(200, 450, 1e3, 0.02, 2)
    fit = procrustes_right(W0, X, anchor=3e-6, special=False)
    assert fit.report.method == "eigh"
    R = fit.rotation().double().numpy()
    assert np.linalg.norm(R.T @ R - np.eye(450)) / math.sqrt(450) < 1e-6
    best = np.linalg.norm(W0.double().numpy() @ oracle(W0, X, 3e-6) - X.double().numpy())
    assert fit.residual == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("wrong", [math.nan, 0.9])
def test_a_result_that_is_not_orthogonal_is_not_taken(monkeypatch, wrong) -> None:
    W0, X = layer(200, 450, 10.0, 0.02, 3)
    monkeypatch.setattr(subspaces, "shifted_polar", lambda C, B, c, out: wrong * torch.eye(400))
    fit = procrustes_right(W0, X, anchor=1e-3)
    assert fit.report.fallbacks == 1
    assert far_from(fit.rotation().double().numpy(), oracle(W0, X, 1e-3)) < 2e-5


@pytest.mark.parametrize("rank", [0, 3])
def test_changes_of_low_rank_and_within_the_rows(rank) -> None:
    """The span has fewer than 2 o dimensions then; what fills it up must not matter."""
    W0, _ = layer(200, 450, 10.0, 0.02, 4)
    rs = np.random.RandomState(4)
    left, right = rs.standard_normal((200, 3)), rs.standard_normal((3, 450))
    D = torch.from_numpy(left @ right).float() if rank else 0.05 * (W0.roll(1, 0) - W0)
    X = W0 + 0.02 * D / float(D.norm()) * float(W0.norm())
    fit = procrustes_right(ProcrustesBase(W0), X, anchor=1e-3)
    R = fit.rotation().double().numpy()
    assert np.linalg.norm(R.T @ R - np.eye(450)) / math.sqrt(450) < 1e-6
    assert far_from(R, oracle(W0, X, 1e-3)) < 1e-4


def test_other_methods_and_dtypes_are_left_alone() -> None:
    W0, X = layer(200, 450, 10.0, 0.02, 5)
    assert procrustes_right(W0, X, anchor=1e-3, method="newton").report.method == "newton"
    wide = procrustes_right(W0.double(), X.double(), anchor=1e-3)
    assert wide.report.method == "eigh"
    assert far_from(wide.rotation().numpy(), oracle(W0, X, 1e-3)) < 1e-10


def test_a_large_rotation_still_has_its_generator() -> None:
    """With angles near pi the half-sized inverses are given up for the whole core."""
    W0, _ = layer(200, 450, 2.0, 0.02, 6)
    fit = procrustes_right(W0, -W0 + 0.3 * W0.flip(0), anchor=1e-3)
    R = fit.rotation().double().numpy()
    A = fit.generator().double().numpy()
    back = np.linalg.solve(np.eye(450) - A, np.eye(450) + A)
    assert np.abs(back - R).max() < 1e-3
