"""The pure algebra: hand-computed cases, optimality, invariances and the cone's KKT conditions."""

from __future__ import annotations

import itertools

import pytest
import torch

from orthomerge.errors import NumericalError, UnknownNameError
from orthomerge.unlearning.projection import decompose, solve_cone
from orthomerge.unlearning.projection.products import products
from orthomerge.unlearning.projection.solving import Grouped, signed_coefficients

T = torch.tensor
SHAPES = [(7, 11), (40,), (3, 5, 2), (1,), (64, 9)]


def draw(seed, k=4, dtype=torch.float32):
    """Correlated gradients of several tensors, and a random preconditioner over four decades."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    common = [normal(s) for s in SHAPES]
    rows = [[(c + normal(c.shape)).to(dtype) for c in common] for _ in range(k)]
    g = [(0.7 * c + normal(c.shape)).to(dtype) for c in common]
    P = [(10 ** (2 * torch.rand(s, generator=generator, dtype=torch.float64))) for s in SHAPES]
    return g, rows, [p.to(dtype) for p in P]


def dot(a, b, P=None):
    P = [torch.ones_like(x, dtype=torch.float64) for x in a] if P is None else P
    return sum(
        float((x.double() * p.double() * y.double()).sum()) for x, y, p in zip(a, b, P, strict=True)
    )


def cosine(a, b, P=None):
    return dot(a, b, P) / (dot(a, a, P) * dot(b, b, P)) ** 0.5


def test_o1_two_tensors_of_one_element() -> None:
    g, r = [T([2.0]), T([1.0])], [T([1.0]), T([3.0])]
    whole = decompose(g, [r])
    assert whole.coefficients.tolist() == [0.5]
    assert [t.item() for t in whole.normal] == [1.5, -0.5]
    single = decompose(g, [r], granularity="per-tensor")
    assert [t.item() for t in single.normal] == [0.0, 0.0]


def test_o2_preconditioned() -> None:
    g, r, P = [T([2.0, 1.0]).double()], [T([1.0, 3.0]).double()], [T([1.0, 0.25]).double()]
    parts = decompose(g, [r], P)
    assert parts.coefficients.item() == pytest.approx(11 / 13, abs=1e-12)
    assert parts.normal[0].tolist() == pytest.approx([1.1538462, -1.5384615], abs=1e-7)
    assert dot(parts.normal, r, P) == pytest.approx(0, abs=1e-12)
    # What a projection that forgets P leaves: the test tells the two apart.
    assert dot(decompose(g, [r]).normal, r, P) == pytest.approx(1.125, abs=1e-12)


def test_o3_dependent_rows_and_the_cutoff() -> None:
    g, rows = [T([3.0, 1, -2])], [[T([1.0, 0, 1])], [T([0.0, 1, 1])]]
    for more in ([], [[T([1.0, 1, 2])]]):
        normal = decompose(g, rows + more).normal[0]
        assert normal.tolist() == pytest.approx([2, 2, -2], abs=1e-6)
    close = [[T([1.0, 0, 1]).double()], [T([1.0, 1e-9, 1]).double()]]
    normal = decompose([g[0].double()], close, rtol=1e-10).normal[0]
    assert normal.tolist() == pytest.approx([2.5, 1, -2.5], abs=1e-8)


@pytest.mark.parametrize(
    ("rows", "f", "hard", "cone"),
    [
        ([(1.0, 1)], (2.0, 1), (0.5, -0.5), (2, 1)),
        ([(1.0, 1)], (-2.0, 1), (-1.5, 1.5), (-1.5, 1.5)),
        ([(1.0, 1)], (1.0, -3), (2, -2), (2, -2)),
        ([(1.0, 1), (1.0, -1)], (-2.0, 1), (0, 0), (0, 0)),
        ([(1.0, 1), (1.0, -1)], (1.0, -3), (0, 0), (2, -2)),
    ],
)
def test_o4_hard_and_cone(rows, f, hard, cone) -> None:
    for mode, expected in (("hard", hard), ("cone", cone)):
        normal = decompose([T(f)], [[T(r)] for r in rows], mode=mode).normal[0]
        assert normal.tolist() == pytest.approx(expected, abs=1e-6)


def test_o5_sign_aware_rule() -> None:
    rows = [[T([1.0, 0, 0])], [T([0.0, 1, 0])]]
    parts = decompose([T([3.0, -4, 5])], rows, mode="sign", retain=[T([2.0, 1, 0])])
    assert parts.normal[0].tolist() == pytest.approx([2.5, 0, 5], abs=1e-6)
    assert float(parts.normal[0] @ T([2.0, 1, 0])) == pytest.approx(5, abs=1e-5)


def test_sign_aware_rule_never_raises_the_retain_loss_on_dependent_rows() -> None:
    g, rows, _ = draw(3)
    K = T([[dot(a, b) for b in (*rows, rows[0])] for a in (*rows, rows[0])]).double()[None]
    b = T([dot(r, g) for r in (*rows, rows[0])]).double()[None]
    retain = K[:, :, 1]
    lam = signed_coefficients(Grouped(K, b, T([dot(g, g)]).double()), retain, rtol=1e-9)
    product = dot(rows[1], g) - float(lam[0] @ K[0, :, 1])
    assert product >= -1e-9
    assert torch.isfinite(lam).all()


@pytest.mark.parametrize("granularity", ["global", "per-tensor"])
def test_residual_pythagoras_and_idempotence(granularity) -> None:
    for seed in range(25):
        g, rows, P = draw(seed)
        parts = decompose(g, rows, P, granularity=granularity)
        assert max(abs(cosine(r, parts.normal, P)) for r in rows) < 1e-6
        square = dot(parts.normal, parts.normal, P) + dot(parts.tangent, parts.tangent, P)
        assert square == pytest.approx(dot(g, g, P), rel=1e-6)
        again = decompose(parts.normal, rows, P, granularity=granularity).normal
        change = [a - b for a, b in zip(again, parts.normal, strict=True)]
        assert dot(change, change) ** 0.5 < 1e-6 * dot(g, g) ** 0.5
        for v, n, t in zip(g, parts.normal, parts.tangent, strict=True):
            torch.testing.assert_close(n + t, v, rtol=1e-6, atol=1e-6)


def test_scales_order_and_signs_of_rows_do_not_matter_to_hard() -> None:
    for seed in range(10):
        g, rows, P = draw(seed)
        plain = decompose(g, rows, P).normal
        scaled = [[f * x for x in r] for f, r in zip((1e-6, -3, 1e5, 0.1), rows, strict=True)]
        for other in (scaled, rows[::-1], [*rows, rows[2]]):
            found = decompose(g, other, P).normal
            change = [a - b for a, b in zip(found, plain, strict=True)]
            assert (dot(change, change) / dot(g, g)) ** 0.5 < 1e-6
        cone = decompose(g, rows, P, mode="cone").normal
        flipped = decompose(g, [[-x for x in r] for r in rows], P, mode="cone").normal
        change = [a - b for a, b in zip(cone, flipped, strict=True)]
        assert (dot(change, change) / dot(g, g)) ** 0.5 > 1e-3


def test_hard_is_linear_in_the_gradient() -> None:
    g, rows, P = draw(1)
    h = draw(2)[0]
    mixed = decompose([2 * a - 3 * b for a, b in zip(g, h, strict=True)], rows, P).normal
    one, two = decompose(g, rows, P).normal, decompose(h, rows, P).normal
    for m, a, b in zip(mixed, one, two, strict=True):
        torch.testing.assert_close(m, 2 * a - 3 * b, rtol=0, atol=2e-5)


def test_no_feasible_direction_is_steeper() -> None:
    g, rows, P = draw(5, dtype=torch.float64)
    best = decompose(g, rows, P).normal
    length = dot(best, best, P) ** 0.5
    for seed in range(200):
        d = draw(100 + seed, dtype=torch.float64)[0]
        if seed % 4:  # near the optimum, where a wrong one would be beaten
            d = [b + 10.0 ** -(seed % 4) * x for b, x in zip(best, d, strict=True)]
        d = decompose(d, rows, P).normal
        assert dot(g, d, P) / dot(d, d, P) ** 0.5 <= length * (1 + 1e-9)


def test_cone_is_feasible_nearer_than_hard_and_nearest() -> None:
    for seed in range(25):
        g, rows, P = draw(seed)
        rows = [[-x for x in r] if i % 2 else r for i, r in enumerate(rows)]
        cone = decompose(g, rows, P, mode="cone").normal
        hard = decompose(g, rows, P).normal
        assert min(cosine(r, cone, P) for r in rows) > -1e-6
        away = [a - b for a, b in zip(cone, g, strict=True)]
        far = [a - b for a, b in zip(hard, g, strict=True)]
        assert dot(away, away, P) <= dot(far, far, P) * (1 + 1e-6)


def enumerated(K, b):
    """The cone by trying every active set: the oracle."""
    best = None
    size = len(b)
    for count in range(size + 1):
        for rows in itertools.combinations(range(size), count):
            y = torch.zeros(size, dtype=torch.float64)
            if rows:
                index = list(rows)
                y[index] = torch.linalg.lstsq(K[index][:, index], b[index], driver="gelsd").solution
            r = b - K @ y
            if (y >= -1e-10).all() and (r <= 1e-9).all():
                value = float(y @ K @ y)
                best = (value, r) if best is None or value < best[0] else best
    return best


@pytest.mark.parametrize("kind", ["full", "duplicate", "dependent", "opposite", "zero"])
def test_cone_meets_kkt_and_the_enumerated_optimum(kind) -> None:
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        G = torch.randn(9, 6, generator=generator, dtype=torch.float64)
        if kind == "duplicate":
            G[:, 3] = G[:, 0]
        if kind == "dependent":
            G[:, 3] = G[:, 0] + G[:, 1]
        if kind == "opposite":
            G[:, 3] = -2 * G[:, 0]
        if kind == "zero":
            G[:, 3] = 0
        u = torch.randn(9, generator=generator, dtype=torch.float64)
        K, b = G.T @ G, G.T @ u
        lam, info = solve_cone(K, b)
        r = b - K @ lam
        scale = G.norm() * u.norm()
        assert (lam >= 0).all()
        assert r.max() <= 1e-10 * scale
        assert abs(float(lam @ r)) <= 1e-9 * scale**2
        assert info.converged
        assert info.violation <= 1e-9 * float(u.norm())
        value, slack = enumerated(K, b)
        assert float(lam @ K @ lam) == pytest.approx(value, rel=1e-7, abs=1e-9)
        torch.testing.assert_close(r, slack, rtol=0, atol=1e-7)
        assert info.rank.item() == (6 if kind == "full" else 5)


def test_batches_solve_like_single_problems() -> None:
    G = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    u = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    K, b = G.mT @ G, (G.mT @ u[..., None])[..., 0]
    for mode in ("hard", "cone"):
        together, info = solve_cone(K, b, mode)
        assert info.rank.shape == (5,)
        for i in range(5):
            torch.testing.assert_close(together[i], solve_cone(K[i], b[i], mode)[0])


def test_offset_asks_for_a_decrease() -> None:
    G = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).double()
    u = torch.randn(7, generator=torch.Generator().manual_seed(1)).double()
    c = T([0.4, 0.0]).double()
    lam, _ = solve_cone(G.T @ G, G.T @ u + c)
    assert (G.T @ (u - G @ lam) <= -c + 1e-12).all()


def test_margin_is_a_floor_of_the_coefficients_as_in_gem() -> None:
    G = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double()
    u = torch.randn(7, generator=torch.Generator().manual_seed(1)).double()
    K, b = G.T @ G, G.T @ u
    lam, _ = solve_cone(K, b, floor=0.5)
    r = b - K @ lam
    assert (lam >= 0.5 - 1e-12).all()
    assert (r <= 1e-10).all() or (lam[r > 1e-10] > 0.5).all()
    assert abs(float((lam - 0.5) @ r)) < 1e-9  # complementary to the floor


def test_rank_one_projection_is_grad_diff_with_another_weight() -> None:
    g, rows, _ = draw(7, k=1)
    alpha, gamma = 0.4, 1.7
    c = float(decompose(g, rows).coefficients)
    for v, n, r in zip(g, decompose(g, rows).normal, rows[0], strict=True):
        torch.testing.assert_close(gamma * n + alpha * r, gamma * v + (alpha - gamma * c) * r)


def test_low_precision_inputs_and_missing_gradients() -> None:
    g, rows, _ = draw(0)
    half = decompose([x.bfloat16() for x in g], [[x.bfloat16() for x in r] for r in rows])
    assert half.normal[0].dtype == torch.float32
    lifted = decompose(
        [x.bfloat16().float() for x in g], [[x.bfloat16().float() for x in r] for r in rows]
    )
    for a, b in zip(half.normal, lifted.normal, strict=True):
        assert torch.equal(a, b)
    gaps = decompose([None, *g[1:]], [[*r[:2], None, *r[3:]] for r in rows])
    zeros = decompose(
        [torch.zeros_like(g[0]), *g[1:]],
        [[*r[:2], torch.zeros_like(r[2]), *r[3:]] for r in rows],
    )
    for a, b in zip(gaps.normal, zeros.normal, strict=True):
        torch.testing.assert_close(a, b)


def test_products_of_long_vectors_are_accurate_and_shards_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(300_001, generator=generator)
    X = common + 0.3 * torch.randn(3, 300_001, generator=generator) + 0.5
    P = torch.rand(300_001, generator=generator) + 0.1
    exact = X.double() * P.double() @ X.double().T
    found = products(X, [X[:1], X[1:]], P)
    scale = exact.diagonal().sqrt()
    assert ((found - exact).abs() / (scale[:, None] * scale)).max() < 3e-8
    cuts = [0, 10, 99_000, 300_001]
    wide = X.double()
    parts = [wide[:, a:b] for a, b in itertools.pairwise(cuts)]
    sharded = sum(products(part, part) for part in parts)
    lam = [solve_cone(K, K[0] * 1.3 - K[1], "hard")[0] for K in (sharded, products(wide, wide))]
    torch.testing.assert_close(lam[0], lam[1], rtol=1e-10, atol=1e-12)


def test_bad_input_is_refused() -> None:
    K = torch.eye(2)
    with pytest.raises(UnknownNameError, match="hard"):
        solve_cone(K, torch.ones(2), "hrad")
    with pytest.raises(NumericalError, match="fit"):
        solve_cone(K, torch.ones(3))
    with pytest.raises(NumericalError, match="finite"):
        solve_cone(K, T([1.0, torch.nan]))
    with pytest.raises(NumericalError, match="differ in shape"):
        decompose([torch.ones(2)], [[torch.ones(3)]])
    with pytest.raises(NumericalError, match="numbers of tensors"):
        decompose([torch.ones(2)], [[torch.ones(2), torch.ones(2)]])
    with pytest.raises(NumericalError, match="not finite"):
        decompose([T([torch.inf])], [[torch.ones(1)]])
