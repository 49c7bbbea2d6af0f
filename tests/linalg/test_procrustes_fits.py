"""Procrustes fits: published figures, exact reductions, optimality, angles near pi, odd input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError, UnknownNameError
from orthomerge.linalg import (
    ProcrustesBase,
    apply_cayley,
    automatic_anchor,
    cayley,
    merge_algebra,
    procrustes_right,
    residual_noise_baseline,
)


def made(o: int, n: int, kappa: float, rs: np.random.RandomState) -> np.ndarray:
    """Return o x n with singular values geometric from 1 to 1/kappa."""
    r = min(o, n)
    U = np.linalg.qr(rs.standard_normal((o, r)))[0]
    V = np.linalg.qr(rs.standard_normal((n, r)))[0]
    return (U * np.geomspace(1, 1 / kappa, r)) @ V.T


def nearby(W0: np.ndarray, fraction: float, rs: np.random.RandomState) -> np.ndarray:
    D = rs.standard_normal(W0.shape)
    return W0 + D * (fraction * np.linalg.norm(W0) / np.linalg.norm(D))


def anchored(W0: np.ndarray, X: np.ndarray, anchor: float) -> np.ndarray:
    """The dense solution, from its formula."""
    lam = anchor * np.linalg.norm(W0) ** 2 / W0.shape[1]
    U, _, Vh = np.linalg.svd(W0.T @ X + lam * np.eye(W0.shape[1]))
    return U @ Vh


def inverse_cayley(R: np.ndarray) -> np.ndarray:
    eye = np.eye(len(R))
    return np.linalg.solve(R + eye, R - eye)


def t(X: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(X))


def test_published_rotations_of_three_experts() -> None:
    """O3, the rotation part of variant G."""
    rs = np.random.RandomState(7)
    W0 = rs.standard_normal((12, 8))
    Ds = [0.05 * rs.standard_normal((12, 8)) for _ in range(3)]
    fits = [procrustes_right(t(W0), t(W0 + D), anchor=0.0) for D in Ds]
    As = [fit.generator() for fit in fits]
    norms = [float(torch.linalg.norm(A)) for A in As]
    assert norms == pytest.approx(
        [0.045111163112831, 0.040707653831102, 0.042819008689840], rel=1e-12
    )
    residuals = [fit.residual for fit in fits]
    assert residuals == pytest.approx(
        [0.388920895642812, 0.388712676044512, 0.455339474411297], rel=1e-12
    )
    A, merged = merge_algebra(torch.stack(As), [1 / 3] * 3)
    assert merged.factors[0] == pytest.approx(1.785798839877639, rel=1e-12)
    assert float(torch.linalg.norm(A)) == pytest.approx(0.042879275211258, rel=1e-11)
    R = cayley(A)
    first = [0.9997180558492426, -0.008808034728840935, -0.01428760118709482]
    assert R[0, :3].tolist() == pytest.approx(first, rel=1e-11)
    assert float(torch.linalg.det(R)) == pytest.approx(1.0, abs=1e-13)
    angles = np.degrees(np.abs(np.angle(np.linalg.eigvals(R.numpy()))))
    expected = [3.00952, 1.535629, 0.789201, 0.170518]
    assert sorted(angles)[::-2] == pytest.approx(expected, abs=1e-5)
    total = t(W0) @ R + 0.2 * sum(t(W0 + D) - f.apply(t(W0)) for D, f in zip(Ds, fits, strict=True))
    assert float(torch.linalg.norm(total)) == pytest.approx(9.879736800977446, rel=1e-12)


def wide_case() -> tuple[np.ndarray, list[np.ndarray]]:
    W0 = made(64, 192, 20, np.random.RandomState(1))
    return W0, [nearby(W0, 0.02, np.random.RandomState(seed)) for seed in range(10, 15)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduce", ["auto", "none", "subspace"])
def test_wide_layers_do_not_move_in_the_null_space(dtype, reduce) -> None:
    """O4: 1.83 %, where a plain SVD's null space moves the weight by 20 %."""
    W0, Xs = wide_case()
    fits = [procrustes_right(t(W0).to(dtype), t(X).to(dtype), reduce=reduce) for X in Xs]
    As = [fit.generator() for fit in fits]
    norms = [float(torch.linalg.norm(A)) for A in As]
    assert norms == pytest.approx([0.329, 0.322, 0.318, 0.328, 0.321], abs=6e-4)
    A, merged = merge_algebra(torch.stack(As), [0.2] * 5)
    assert merged.factors[0] == pytest.approx(2.225, abs=2e-3)
    assert float(torch.linalg.norm(A)) == pytest.approx(0.3234, abs=2e-4)
    moved = apply_cayley(t(W0).to(dtype), A) - t(W0)
    assert float(torch.linalg.norm(moved)) / np.linalg.norm(W0) == pytest.approx(0.01829, abs=2e-5)


def test_the_reference_form_does_move_there() -> None:
    W0, Xs = wide_case()
    fit = procrustes_right(t(W0), t(Xs[0]), anchor=0.0, null="svd")
    assert fit.reduction == "dense"
    assert float(torch.linalg.norm(fit.rotation() - torch.eye(192))) > 5
    assert fit.residual == pytest.approx(procrustes_right(t(W0), t(Xs[0])).residual, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 20), (8, 16), (5, 40), (1, 9)])
@pytest.mark.parametrize("fraction", [0.02, 0.3])
def test_the_subspace_and_the_qr_core_are_exact(shape, fraction) -> None:
    """P16."""
    rs = np.random.RandomState(3)
    W0 = made(*shape, 20, rs)
    X = nearby(W0, fraction, rs)
    for reduce, anchor in (("subspace", 1e-3), ("none", 1e-3)):
        fit = procrustes_right(t(W0), t(X), anchor=anchor, reduce=reduce)
        assert np.abs(fit.rotation().numpy() - anchored(W0, X, anchor)).max() < 1e-8
    core = procrustes_right(t(W0), t(X), anchor=0.0, reduce="qr-core")
    limit = procrustes_right(t(W0), t(X), anchor=0.0, reduce="none")
    assert core.reduction == "qr-core"
    assert limit.reduction == "dense"
    if core.retries == limit.retries == 0:
        assert np.abs((core.rotation() - limit.rotation()).numpy()).max() < 1e-8
    else:
        pytest.fail("the case was meant to need no larger anchor")


@pytest.mark.parametrize(("shape", "anchor"), [((6, 20), 1e-6), ((6, 20), 1e-2), ((9, 8), 1e-6)])
def test_every_form_of_a_fit_says_the_same(shape, anchor) -> None:
    rs = np.random.RandomState(4)
    W0 = made(*shape, 10, rs)
    X = nearby(W0, 0.1, rs)
    fit = procrustes_right(t(W0), t(X), anchor=anchor)
    R = fit.rotation()
    W = t(rs.standard_normal((3, shape[1])))
    assert torch.allclose(fit.apply(W), W @ R, atol=1e-12)
    A = fit.generator()
    assert torch.allclose(A, t(inverse_cayley(R.numpy())), atol=1e-11)
    assert torch.equal(A, -A.mT)
    assert torch.allclose(apply_cayley(W, A), W @ R, atol=1e-11)
    assert fit.residual == pytest.approx(np.linalg.norm(W0 @ R.numpy() - X), rel=1e-12)
    if fit.frame is not None:
        S = fit.frame
        assert torch.allclose(S.mT @ S, torch.eye(S.shape[1], dtype=S.dtype), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 24), st.integers(0, 999), st.floats(1e-3, 0.5))
def test_fits_are_rotations_that_keep_the_rows_geometry(o, n, seed, fraction) -> None:
    """P9, P10 (row distances) and P11."""
    rs = np.random.RandomState(seed)
    W0 = made(o, n, 5, rs)
    X = nearby(W0, fraction, rs)
    fit = procrustes_right(t(W0), t(X))
    R = fit.rotation().numpy()
    assert np.linalg.norm(R.T @ R - np.eye(n)) / math.sqrt(n) < 1e-10
    assert np.linalg.det(R) > 0
    turned = fit.apply(t(W0)).numpy()
    assert np.allclose(turned @ turned.T, W0 @ W0.T, atol=1e-10)
    assert np.allclose(np.linalg.svd(turned)[1], np.linalg.svd(W0)[1], atol=1e-10)


@pytest.mark.parametrize("shape", [(10, 6), (6, 6), (4, 12)])
def test_no_other_rotation_does_better(shape) -> None:
    rs = np.random.RandomState(5)
    W0 = made(*shape, 8, rs)
    X = nearby(W0, 0.4, rs)
    anchor = 1e-3
    lam = anchor * np.linalg.norm(W0) ** 2 / shape[1]
    R = procrustes_right(t(W0), t(X), anchor=anchor).rotation().numpy()

    def cost(Q: np.ndarray) -> float:
        turned = np.linalg.norm(W0 @ Q - X) ** 2
        return float(turned + lam * np.linalg.norm(Q - np.eye(shape[1])) ** 2)

    best = cost(R)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(60):
            B = size * rs.standard_normal(R.shape)
            assert cost(R @ cayley(t(B - B.T)).numpy()) >= best - 1e-12


@pytest.mark.parametrize("shape", [(8, 8), (12, 8), (4, 12), (3, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("anchor", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("block", [None, 1])
def test_an_unchanged_weight_is_exactly_the_identity(shape, anchor, block) -> None:
    """P12."""
    W0 = torch.from_numpy(np.random.RandomState(2).standard_normal(shape)).float()
    fit = procrustes_right(W0, W0.clone(), anchor=anchor, block=block)
    assert fit.reduction == "identity"
    assert torch.equal(fit.apply(W0), W0)
    assert torch.equal(fit.rotation(), torch.eye(shape[1]))
    assert not fit.generator().any()
    assert fit.residual == 0.0
    nothing = procrustes_right(torch.zeros(shape), W0, anchor=anchor)
    assert torch.equal(nothing.rotation(), torch.eye(shape[1]))


def test_a_reflection_is_turned_into_the_best_rotation() -> None:
    rs = np.random.RandomState(8)
    W0 = made(9, 5, 4, rs)
    H = np.linalg.qr(rs.standard_normal((5, 5)))[0]
    H[:, 0] *= -np.sign(np.linalg.det(H))  # determinant -1
    X = W0 @ H + 0.1 * rs.standard_normal((9, 5))
    U, _, Vh = np.linalg.svd(W0.T @ X)
    assert np.linalg.det(U @ Vh) < 0
    kabsch = U @ np.diag([1, 1, 1, 1, -1.0]) @ Vh
    fit = procrustes_right(t(W0), t(X), anchor=0.0)
    assert fit.retries == 0
    assert np.allclose(fit.rotation().numpy(), kabsch, atol=1e-11)
    free = procrustes_right(t(W0), t(X), anchor=0.0, null="svd")
    assert float(torch.linalg.det(free.rotation())) < 0
    raised = procrustes_right(t(W0), t(X), anchor=1e-6)
    assert raised.retries > 0
    assert raised.anchor > 1e-6
    assert float(torch.linalg.det(raised.rotation())) > 0


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 9)])
def test_angles_near_pi_raise_the_anchor(shape) -> None:
    rs = np.random.RandomState(1)
    W0 = rs.standard_normal(shape)
    fit = procrustes_right(t(W0), t(-W0), anchor=1e-6)
    assert fit.retries > 0
    cosines = np.cos(np.angle(np.linalg.eigvals(fit.rotation().numpy())))
    assert cosines.min() > -1 + 1e-6
    assert np.isfinite(fit.generator().numpy()).all()


@pytest.mark.parametrize("shape", [(9, 6), (4, 12), (5, 7)])
def test_the_automatic_anchor_keeps_angles_below_a_right_one(shape) -> None:
    rs = np.random.RandomState(6)
    W0 = made(*shape, 1000, rs)
    X = nearby(W0, 0.5, rs)
    anchor = automatic_anchor(t(W0), t(X - W0))
    least = np.linalg.norm(W0.T @ (X - W0), 2) * shape[1] / np.linalg.norm(W0) ** 2
    assert least < anchor < 1.5 * least
    fit = procrustes_right(t(W0), t(X), anchor=anchor)
    assert fit.retries == 0
    assert np.abs(np.angle(np.linalg.eigvals(fit.rotation().numpy()))).max() < math.pi / 2


def test_a_larger_anchor_tames_an_ill_conditioned_layer() -> None:
    rs = np.random.RandomState(0)
    W0 = made(64, 64, 1000, rs)
    X = nearby(W0, 0.02, rs)
    D = np.linalg.norm(X - W0)
    plain = procrustes_right(t(W0), t(X), anchor=1e-6, special=False)
    largest, cost = [], []
    for anchor in (1e-4, 1e-3, 1e-2):
        fit = procrustes_right(t(W0), t(X), anchor=anchor)
        assert fit.anchor == anchor
        R = fit.rotation().numpy()
        assert np.abs(R - anchored(W0, X, anchor)).max() < 1e-8
        largest.append(np.degrees(np.abs(np.angle(np.linalg.eigvals(R)))).max())
        cost.append(fit.residual / D)
    assert largest == pytest.approx([43.7, 15.2, 5.3], rel=0.06)
    assert cost == pytest.approx([0.7165, 0.7397, 0.7802], rel=0.01)
    assert plain.residual / D < cost[0]


@pytest.mark.parametrize("shape", [(8, 6), (4, 12), (3, 5)])
@pytest.mark.parametrize("anchor", [0.0, 1e-6])
def test_rank_deficient_weights(shape, anchor) -> None:
    rs = np.random.RandomState(9)
    W0 = rs.standard_normal(shape)
    W0[:, -2:] = 0  # dead inputs
    W0[0] = W0[1]
    X = W0 + 0.01 * rs.standard_normal(shape)
    X[:, -2:] = 0
    fit = procrustes_right(t(W0), t(X), anchor=anchor)
    R = fit.rotation().numpy()
    assert np.allclose(R.T @ R, np.eye(shape[1]), atol=1e-10)
    assert np.allclose(R[-2:], np.eye(shape[1])[-2:], atol=1e-9)
    best = np.linalg.norm(W0 @ anchored(W0, X, 1e-9) - X)
    assert fit.residual == pytest.approx(best, rel=1e-3)
    assert np.abs(R - np.eye(shape[1])).max() < 0.3


def test_tied_singular_values() -> None:
    Q = np.linalg.qr(np.random.RandomState(1).standard_normal((6, 6)))[0]
    R = np.linalg.qr(np.random.RandomState(2).standard_normal((6, 6)))[0]
    R[:, 0] *= np.linalg.det(R)
    fit = procrustes_right(t(Q), t(Q @ R), anchor=0.0)
    assert np.allclose(fit.rotation().numpy(), R, atol=1e-12)


def test_blocks_are_fitted_each_for_itself() -> None:
    rs = np.random.RandomState(3)
    W0 = made(10, 12, 6, rs)
    X = nearby(W0, 0.1, rs)
    fit = procrustes_right(t(W0), t(X), block=4, anchor=1e-3)
    lam = 1e-3 * np.linalg.norm(W0) ** 2 / 12
    assert fit.reduction == "block"
    assert fit.core.shape == fit.generator().shape == (3, 4, 4)
    for k in range(3):
        cut = slice(4 * k, 4 * k + 4)
        U, _, Vh = np.linalg.svd(W0[:, cut].T @ X[:, cut] + lam * np.eye(4))
        assert np.allclose(fit.core[k].numpy(), U @ Vh, atol=1e-12)
    assert torch.allclose(fit.apply(t(W0)), t(W0) @ fit.rotation(), atol=1e-13)
    assert torch.allclose(apply_cayley(t(W0), fit.generator()), fit.apply(t(W0)), atol=1e-12)


def test_a_prepared_base_gives_the_same() -> None:
    W0, Xs = wide_case()
    base = ProcrustesBase(t(W0))
    for X in Xs[:2]:
        shared, alone = procrustes_right(base, t(X)), procrustes_right(t(W0), t(X))
        assert torch.equal(shared.rotation(), alone.rotation())


@pytest.mark.parametrize("method", ["svd", "eigh", "newton", "qdwh", "quintic"])
def test_methods_agree_in_float32(method) -> None:
    rs = np.random.RandomState(4)
    W0 = made(30, 20, 10, rs)
    X = nearby(W0, 0.05, rs)
    fit = procrustes_right(t(W0).float(), t(X).float(), method=method)
    assert fit.report.method == method
    assert np.abs(fit.rotation().numpy() - anchored(W0, X, 1e-6)).max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchor": -1.0}, "anchor"),
        ({"anchor": math.nan}, "anchor"),
        ({"block": 3}, "block size"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message) -> None:
    W = torch.eye(4)
    with pytest.raises(NumericalError, match=message):
        procrustes_right(W, 2 * W, **arguments)


def test_impossible_weights_are_refused() -> None:
    W = torch.eye(4)
    with pytest.raises(NumericalError, match="one shape"):
        procrustes_right(W, torch.eye(3))
    with pytest.raises(NumericalError, match="not finite"):
        procrustes_right(W, W * math.nan)
    with pytest.raises(UnknownNameError, match="subspace"):
        procrustes_right(W, 2 * W, reduce="subspce")  # type: ignore[arg-type]


def test_the_noise_baseline_is_what_noise_leaves() -> None:
    rs = np.random.RandomState(0)
    for o, n in ((60, 60), (120, 60), (30, 90)):
        W0 = np.linalg.qr(rs.standard_normal((max(o, n), min(o, n))))[0]
        W0 = W0 if o >= n else W0.T
        X = nearby(W0, 0.01, rs)
        fit = procrustes_right(t(W0), t(X))
        expected = residual_noise_baseline(o, n)
        if o < n:  # a wide isotropic base also turns into its complement, without cost
            expected = math.sqrt(o / (2 * n))
        assert fit.residual / np.linalg.norm(X - W0) == pytest.approx(expected, rel=0.05)


def test_the_log_chart_has_the_angles_themselves() -> None:
    pytest.importorskip("orthomerge.linalg.logarithms")
    rs = np.random.RandomState(4)
    W0 = made(6, 20, 10, rs)
    fit = procrustes_right(t(W0), t(nearby(W0, 0.1, rs)))
    L = fit.generator("log")
    assert torch.allclose(torch.linalg.matrix_exp(L), fit.rotation(), atol=1e-9)
