"""DO-Merging against its formulas on dense matrices: worked examples, laws, edges."""

from __future__ import annotations

import itertools
import math

import dense_do_merging as dense
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import Factors
from orthomerge.merging.lora.magnitudes import mean_magnitude
from orthomerge.merging.lora.presets import PRESETS, resolved_preset
from orthomerge.merging.methods.do_merging import do_merging
from orthomerge.merging.nesting import nested_method
from orthomerge.merging.registry import get_method
from orthomerge.merging.spaces import Space

TIGHT = {"tolerance": 1e-10, "steps": 4000}
SOLVERS = ("lowdin", "lbfgs", "gd", "adam", "ridge", "none")


def as_factors(pairs, dtype=torch.float64):
    return [Factors(torch.tensor(B, dtype=dtype), torch.tensor(A, dtype=dtype)) for B, A in pairs]


def merge(pairs, weights=None, dtype=torch.float64, **parameters):
    merged = do_merging(
        as_factors(pairs, dtype), weights=weights or [1.0] * len(pairs), **parameters
    )
    assert merged.tensor.B.dtype == dtype
    return merged.tensor.dense().double().numpy(), merged.facts


def adapters(o, n, ranks, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((o, r)), rng.standard_normal((r, n))) for r in ranks]


def waves(m, n, s):
    i, j = np.arange(m)[:, None], np.arange(n)[None]
    return np.sin(1 + s + 1.7 * i + 0.9 * j + 0.3 * i * j)


WAVES = [(waves(6, 2, k), 10**k * waves(2, 8, k + 10)) for k in range(3)]


def close(found, wanted, tolerance=1e-10):
    size = max(np.linalg.norm(wanted), 1e-300)
    assert np.linalg.norm(found - wanted) <= tolerance * size


def cosine(X, Y):
    return (X * Y).sum() / np.linalg.norm(X) / np.linalg.norm(Y)


# Worked examples.


def test_decoupling_gives_the_quiet_update_an_equal_say() -> None:
    pairs = [
        (np.array([[1.0], [0.0]]), np.array([[3.0, 4.0]])),
        (np.array([[0.0], [1.0]]), np.array([[30.0, 40.0]])),
    ]
    options = {"orthogonalise": "none", "decouple_strength": 1.0}
    found, facts = merge(pairs, **options)
    np.testing.assert_allclose(found, [[16.5, 22.0], [16.5, 22.0]])
    assert facts["imbalance"] == pytest.approx(10.0)
    total = sum(B @ A for B, A in pairs)
    cosines = [(cosine(B @ A, total), cosine(B @ A, found)) for B, A in pairs]
    wanted = [(0.09950372, 0.70710678), (0.99503719, 0.70710678)]
    np.testing.assert_allclose(cosines, wanted, atol=1e-8)
    found, facts = merge(pairs, scale="auto", **options)
    np.testing.assert_allclose(found, [[11.66726189, 15.55634919]] * 2, rtol=1e-8)
    assert facts["scale"] == pytest.approx(1 / math.sqrt(2))


TWO_OF_THREE = [
    (np.array([[1.0, 0], [2, 1], [0, 1]]), np.array([[1.0, 0, 2], [0, 0, -1]])),
    (np.array([[0.0, 1], [1, 0], [1, 1]]), np.array([[2.0, 1, 0], [1, -1, 1]])),
]


def test_columns_of_zeros_count_only_when_asked_to() -> None:
    options = {"orthogonalise": "none", "decouple_strength": 1.0}
    found, _ = merge(TWO_OF_THREE, **options)
    wanted = [[2.1355, -1, 3.2008], [4.2709, 1, 2.0669], [2.3964, 0, 1.1339]]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    counted, _ = merge(TWO_OF_THREE, zero_columns="include", **options)
    np.testing.assert_allclose(counted[:, 1], [-0.5, 0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(counted[:, [0, 2]], found[:, [0, 2]], atol=1e-12)
    auto, facts = merge(TWO_OF_THREE, scale="auto", **options)
    wanted = [[1.3490, -0.6317, 2.0221], [2.6981, 0.6317, 1.3058], [1.5139, 0, 0.7163]]
    np.testing.assert_allclose(auto, wanted, atol=1e-4)
    sizes = [np.linalg.norm(B @ A) for B, A in TWO_OF_THREE]
    assert np.linalg.norm(auto) == pytest.approx(4.30076982, abs=1e-8)
    assert np.linalg.norm(auto) == pytest.approx(np.mean(sizes))
    close(auto, facts["scale"] * found)


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"orthogonalise": "none"}, (439.13322239, -21.40078477, -52.42986972, -27.80325306)),
        ({"orthogonalise": "lbfgs"}, (425.452387, 110.111711, -56.520923, -58.197969)),
        ({"orthogonalise": "lowdin"}, (387.39760636, 36.84261649, -42.48060017, -68.55068992)),
        (
            {"orthogonalise": "lbfgs", "decouple_strength": 0.0},
            (510.882923, -37.995721, -53.551213, -129.844823),
        ),
        (
            {"orthogonalise": "lbfgs", "axis": "out"},
            (399.920204, 370.520806, -43.490791, -101.670749),
        ),
    ],
    ids=["decoupled", "lbfgs", "lowdin", "not-decoupled", "rows"],
)
def test_three_wavy_updates(parameters, wanted) -> None:
    norms = [np.linalg.norm(B @ A) for B, A in WAVES]
    np.testing.assert_allclose(norms, (4.81316972, 49.62448945, 517.31245477), rtol=1e-8)
    options = {"decouple_strength": 1.0, "gamma": 1.0, "target": "both", **TIGHT, **parameters}
    found, _ = merge(WAVES, **options)
    seen = (np.linalg.norm(found), found.sum(), found[0, 0], found[5, 7])
    tolerance = 1e-5 if "lbfgs" in parameters.values() else 1e-8
    np.testing.assert_allclose(seen, wanted, rtol=tolerance)


# Against the formulas on dense matrices.


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(12, 20),
    st.integers(12, 20),
    st.sampled_from(["lowdin", "ridge", "none", "adam"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(["mean", "median", "geomean", "rms", "max", "sum"]),
    st.sampled_from(["in", "out"]),
    st.sampled_from(["orth", "original"]),
    st.booleans(),
    st.sampled_from([1.0, "auto"]),
    st.integers(0, 99),
)
def test_equals_the_dense_formulas(
    ranks, o, n, how, p, magnitude, axis, source, renormalise, scale, seed
) -> None:
    pairs = adapters(o, n, ranks, seed)
    pairs[0] = (pairs[0][0] * 10, pairs[0][1])
    pairs[-1][1][:, 2] = 0.0
    weights = [(-1.0) ** i * (0.5 + i) for i in range(len(pairs))]
    gauge = "stored" if how == "adam" else "balanced"  # Adam depends on the basis, up to signs
    wanted, factor = dense.merge(
        pairs, weights, how=how, p=p, magnitude=magnitude, axis=axis, source=source,
        renormalise=renormalise, scale=scale, gauge=gauge, steps=30,
    )  # fmt: skip
    found, facts = merge(
        pairs, weights, orthogonalise=how, decouple_strength=p, magnitude=magnitude, axis=axis,
        magnitude_source=source, renormalise=renormalise, scale=scale, gauge=gauge, gamma=1.0,
        steps=30, target="both",
    )  # fmt: skip
    close(found, wanted, 1e-9)
    assert facts["scale"] == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("solver", ["lbfgs", "gd"])
def test_descent_equals_a_minimiser_on_the_stack(solver) -> None:
    pairs = adapters(15, 12, [2, 3, 1])
    wanted, _ = dense.merge(pairs, how="lbfgs", gamma=5.0, p=1.0)
    options = {"orthogonalise": solver, "gamma": 5.0, "decouple_strength": 1.0, "target": "both"}
    found, _ = merge(pairs, **options, **TIGHT)
    close(found, wanted, 2e-6)


@pytest.mark.parametrize("target", ["A", "B", "both"])
def test_one_side_alone_is_made_orthogonal(target) -> None:
    pairs = adapters(15, 12, [2, 3])
    sides = {"A": "A", "B": "B", "both": "BA"}[target]
    found, facts = merge(pairs, target=target)
    close(found, dense.merge(pairs, how="lowdin", sides=sides)[0])
    for side in "AB":
        assert facts[f"overlap_{side}_before"] > 0.1
        assert (facts[f"overlap_{side}_after"] < 1e-12) == (side in sides)
        assert (facts[f"drift_{side}"] > 0.01) == (side in sides)


def test_the_default_is_tsv_m_with_all_singular_values() -> None:
    pairs = adapters(20, 16, [2, 3, 4])
    left, values, right = [], [], []
    for B, A in pairs:
        U, s, Vh = np.linalg.svd(B @ A)
        r = A.shape[0]
        left.append(U[:, :r])
        values.append(s[:r])
        right.append(Vh[:r].T)

    def polar(M):
        U, _, Vh = np.linalg.svd(M, full_matrices=False)
        return U @ Vh

    wanted = polar(np.hstack(left)) * np.concatenate(values) @ polar(np.hstack(right)).T
    found, _ = merge(pairs)
    close(found, wanted)
    assert np.linalg.matrix_rank(found, tol=1e-8) == 9


def test_no_strength_is_the_plain_sum() -> None:
    pairs = adapters(9, 8, [2, 3])
    wanted = 2.0 * pairs[0][0] @ pairs[0][1] - pairs[1][0] @ pairs[1][1]
    close(merge(pairs, [2.0, -1.0], strength=0.0)[0], wanted)
    close(merge(pairs, [2.0, -1.0], orthogonalise="none", gauge="stored")[0], wanted)


def test_equal_magnitudes_make_decoupling_the_plain_sum() -> None:
    pairs = [(np.linalg.qr(B)[0], np.ones((1, 7))) for B, _ in adapters(9, 7, [1, 1, 1])]
    found, _ = merge(pairs, orthogonalise="none", decouple_strength=1.0)
    close(found, sum(B @ A for B, A in pairs), 1e-12)


def test_a_loud_update_no_longer_drowns_the_others() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((12, r)), rng.standard_normal((r, 15))) for r in (3, 2, 4)]
    pairs[0] = (100 * pairs[0][0], pairs[0][1])
    updates = [B @ A for B, A in pairs]
    least = {}
    for name, p in (("sum", 0.0), ("decoupled", 1.0)):
        found, _ = merge(pairs, orthogonalise="none", decouple_strength=p)
        least[name] = min(cosine(D, found) for D in updates)
    found, _ = merge(pairs, orthogonalise="lbfgs", decouple_strength=1.0, gamma=1.0)
    least["both"] = min(cosine(D, found) for D in updates)
    assert least["sum"] < 0.1
    assert least["decoupled"] > 0.3
    assert least["both"] > 0.3


@pytest.mark.parametrize(
    ("weights", "wanted"), [([1, 1, 1, 1], 3.5), ([1, 1, 1, 0], 2.0), ([3, 1, 1, 1], 1.5)]
)
def test_the_median_of_an_even_number_lies_between_the_middle_two(weights, wanted) -> None:
    alpha = torch.tensor([[1.0], [2.0], [5.0], [9.0]])
    found = mean_magnitude(alpha, torch.tensor(weights)[:, None].float(), "median")
    assert float(found) == pytest.approx(wanted)


# Laws.

DECOUPLED = {"decouple_strength": 1.0, "scale": "auto", "gamma": 1.0, **TIGHT, "tolerance": 1e-9}


@pytest.mark.parametrize("preset", ["robust", "paper"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_single_adapter_is_itself(preset, solver) -> None:
    (pair,) = adapters(9, 8, [3])
    for p in (0.0, 1.0):
        found, _ = merge([pair], preset=preset, orthogonalise=solver, decouple_strength=p, steps=9)
        close(found, pair[0] @ pair[1], 2e-14)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_order_of_adapters_does_not_matter(solver, p) -> None:
    pairs, weights = adapters(14, 12, [2, 3, 2]), [1.0, -0.5, 2.0]
    options = {"orthogonalise": solver, "decouple_strength": p, "gamma": 2.0, "tolerance": 1e-9}
    options["gauge"] = "stored" if solver == "adam" else "balanced"
    options["steps"] = 40 if solver in ("adam", "gd") else 1000
    wanted, _ = merge(pairs, weights, **options)
    tolerance = {"lbfgs": 1e-6, "gd": 1e-9}.get(solver, 1e-12)
    for order in itertools.permutations(range(3)):
        found, _ = merge([pairs[i] for i in order], [weights[i] for i in order], **options)
        close(found, wanted, tolerance)


@pytest.mark.parametrize("solver", ["lowdin", "lbfgs", "gd", "ridge", "none"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_scaling_the_updates_scales_the_result(solver, p) -> None:
    pairs = adapters(14, 12, [2, 3, 2])
    options = {"orthogonalise": solver, "decouple_strength": p, "steps": 40, "scale": "auto"}
    wanted, _ = merge(pairs, **options)
    for c in (1e-3, 1e3):
        close(merge([(B * c, A) for B, A in pairs], **options)[0], c * wanted, 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["lowdin", "ridge", "none"]), st.sampled_from([0.0, 1.0]), st.integers(0, 99)
)
def test_how_training_has_split_an_update_does_not_matter(solver, p, seed) -> None:
    pairs = adapters(14, 12, [2, 3, 2], seed)
    rng = np.random.default_rng(seed)
    mixed = []
    for B, A in pairs:
        U, _, Vh = np.linalg.svd(rng.standard_normal((A.shape[0],) * 2))
        M = U * rng.uniform(0.1, 10.0, len(U)) @ Vh
        mixed.append((B @ np.linalg.inv(M), M @ A))
    options = {"orthogonalise": solver, "decouple_strength": p}
    wanted, _ = merge(pairs, **options)
    close(merge(mixed, **options)[0], wanted, 1e-10)
    close(merge([(7 * B, A / 7) for B, A in pairs], **options)[0], wanted, 1e-12)


def test_stored_factors_depend_on_how_training_has_split_them() -> None:
    pairs = adapters(14, 12, [2, 3, 2])
    options = {"gauge": "stored", "orthogonalise": "ridge", "normalise": False}
    wanted, _ = merge(pairs, **options)
    found, _ = merge([(7 * B, A / 7) for B, A in pairs], **options)
    assert np.linalg.norm(found - wanted) > 0.1 * np.linalg.norm(wanted)
    turned = []
    for B, A in pairs:
        Q = np.linalg.qr(np.random.default_rng(3).standard_normal((A.shape[0],) * 2))[0]
        turned.append((B @ Q.T, Q @ A))
    close(merge(turned, **options)[0], wanted, 1e-12)


@pytest.mark.parametrize("solver", ["lowdin", "lbfgs", "ridge", "none"])
def test_rotating_outputs_and_reordering_inputs_commute_with_merging(solver) -> None:
    pairs = adapters(14, 12, [2, 3, 2])
    options = {"orthogonalise": solver, "decouple_strength": 1.0, **TIGHT}
    wanted, _ = merge(pairs, **options)
    Q = np.linalg.qr(np.random.default_rng(5).standard_normal((14, 14)))[0]
    order = np.random.default_rng(6).permutation(12)
    tolerance = 1e-6 if solver == "lbfgs" else 1e-11
    close(merge([(Q @ B, A) for B, A in pairs], **options)[0], Q @ wanted, tolerance)
    close(merge([(B, A[:, order]) for B, A in pairs], **options)[0], wanted[:, order], tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_a_zero_adapter_is_an_absent_one(solver, preset) -> None:
    pairs = adapters(14, 12, [2, 3, 2])
    options = {"preset": preset, "orthogonalise": solver, "decouple_strength": 1.0, "steps": 30}
    options |= {"scale": "auto", "magnitude": "median"}
    if solver == "adam":
        options["gauge"] = "stored"
    wanted, facts = merge(pairs, **options)
    untrained = (np.zeros((14, 4)), np.ones((4, 12)))
    orthogonal = (np.ones((14, 1)) @ [[1.0, -1.0]], np.ones((2, 12)))  # B A = 0, neither is 0
    for extra in (untrained, orthogonal):
        found, again = merge([pairs[0], extra, *pairs[1:]], **options)
        close(found, wanted, 1e-9)
        assert again == pytest.approx(facts, rel=1e-9)
    found, _ = merge([*pairs, pairs[0]], [1.0, 1.0, 1.0, 0.0], **options)
    close(found, wanted, 1e-12)


# Copies, opposites, and what soft solvers do to them.


@pytest.mark.parametrize("solver", ["lowdin", "none"])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_copies_merge_to_themselves_with_an_automatic_scale(solver, count, p) -> None:
    (pair,) = adapters(14, 12, [3])
    found, facts = merge([pair] * count, orthogonalise=solver, decouple_strength=p, scale="auto")
    close(found, pair[0] @ pair[1], 1e-12)
    raw = solver == "none" or p == 1.0  # Löwdin shares copies out; taking magnitudes off undoes it
    assert facts["scale"] == pytest.approx(1 / count if raw else 1.0)


def test_copies_merge_to_themselves_at_the_default() -> None:
    (pair,) = adapters(14, 12, [3])
    close(merge([pair] * 4)[0], pair[0] @ pair[1], 1e-12)


def test_soft_solvers_do_not_keep_copies() -> None:
    """They compress the spectrum: large singular values shrink more than small ones."""
    (pair,) = adapters(12, 10, [3])
    D = pair[0] @ pair[1]
    errors = {}
    for name, parameters in {
        "lbfgs-1": {"orthogonalise": "lbfgs", "gamma": 1.0},
        "lbfgs-10": {"orthogonalise": "lbfgs", "gamma": 10.0},
        "ridge-1": {"orthogonalise": "ridge", "gamma": 1.0},
    }.items():
        found, _ = merge([pair] * 2, scale="auto", **TIGHT, **parameters)
        errors[name] = np.linalg.norm(found - D) / np.linalg.norm(D)
    assert 1e-3 < errors["lbfgs-10"] < errors["lbfgs-1"] < 0.3
    assert errors["lbfgs-1"] < errors["ridge-1"] < 0.9


def test_magnitudes_of_the_original_undo_the_shrinking_of_copies() -> None:
    (pair,) = adapters(9, 8, [1])
    D = pair[0] @ pair[1]
    options = {"orthogonalise": "lbfgs", "gamma": 1.0, "decouple_strength": 1.0, **TIGHT}
    found, _ = merge([pair] * 2, magnitude_source="original", **options)
    close(found, 2 * D, 1e-9)
    shrunk, _ = merge([pair] * 2, magnitude_source="orth", **options)
    c = next(r.real for r in np.roots([2, 0, 1, -1]) if abs(r.imag) < 1e-12)  # each factor's
    close(shrunk, 2 * c**2 * D, 1e-8)
    assert 2 * c**2 == pytest.approx(0.6956, abs=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_adapters_give_exactly_zero(solver, p, dtype) -> None:
    (pair,) = adapters(14, 12, [3])
    for scale in (1.0, "auto"):
        found, facts = merge(
            [pair, (-pair[0], pair[1])],
            dtype=dtype, orthogonalise=solver, decouple_strength=p, scale=scale, steps=20,
        )  # fmt: skip
        assert not found.any()
        assert all(math.isfinite(value) for value in facts.values())


def test_the_cap_limits_how_much_a_column_is_amplified() -> None:
    (pair,) = adapters(9, 8, [1])
    options = {"orthogonalise": "ridge", "gamma": 1e-3, "decouple_strength": 1.0}
    full, _ = merge([pair] * 2, cap=math.inf, **options)
    capped, _ = merge([pair] * 2, cap=2.0, **options)
    close(full, 2 * pair[0] @ pair[1], 1e-6)
    close(capped, dense.merge([pair] * 2, how="ridge", gamma=1e-3, p=1.0, cap=2.0)[0], 1e-7)
    assert np.linalg.norm(capped) < 0.1 * np.linalg.norm(full)


# Sharing a frame.


def test_a_frame_that_all_share_is_spared() -> None:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((3, 20))
    pairs = [
        (rng.standard_normal((16, 3)), A + 0.02 * rng.standard_normal((3, 20))) for _ in range(3)
    ]
    found, facts = merge(pairs)
    close(found, dense.merge(pairs, how="lowdin", sides="B")[0])
    assert facts["drift_A"] == 0.0
    assert facts["overlap_A_after"] == facts["overlap_A_before"] > 1
    turned = [(A.T, B.T) for B, A in pairs]
    close(merge(turned)[0], found.T, 1e-12)
    close(merge(pairs, target="both")[0], dense.merge(pairs, how="lowdin")[0], 1e-8)


# Edges.


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_but_zeros_gives_zeros(solver, p) -> None:
    pairs = [(np.zeros((5, 2)), np.ones((2, 4)))] * 2
    for scale in (1.0, "auto"):
        found, facts = merge(
            pairs, orthogonalise=solver, decouple_strength=p, scale=scale, renormalise=True
        )
        assert found.shape == (5, 4)
        assert not found.any()
        assert all(math.isfinite(value) for value in facts.values())
    found, _ = merge(adapters(5, 4, [2, 1]), [0.0, 0.0], orthogonalise=solver)
    assert not found.any()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_more_directions_than_dimensions_stay_finite(solver, p) -> None:
    pairs = adapters(6, 5, [4, 3, 7])
    for dtype in (torch.float32, torch.float64):
        options = {"orthogonalise": solver, "decouple_strength": p, "scale": "auto", "steps": 40}
        found, facts = merge(pairs, dtype=dtype, **options)
        assert np.isfinite(found).all()
        assert 0 < np.linalg.norm(found) < 1e3
        assert all(math.isfinite(value) for value in facts.values())


def test_deficient_and_empty_adapters() -> None:
    pairs = adapters(14, 12, [2, 3])
    wanted, _ = merge(pairs)
    (B, A), other = pairs
    twice = (np.hstack([B, B]) / 2, np.vstack([A, A]))
    close(merge([twice, other])[0], wanted, 1e-7)
    nothing = (np.zeros((14, 0)), np.zeros((0, 12)))
    close(merge([(B, A), nothing, other])[0], wanted, 1e-12)
    assert not merge([nothing])[0].any()


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("solver", ["lowdin", "lbfgs", "gd", "ridge", "none"])
def test_float32_is_close_to_float64(solver, p) -> None:
    pairs = [(0.02 * B, 0.05 * A) for B, A in adapters(40, 30, [4, 8, 2])]
    options = {"orthogonalise": solver, "decouple_strength": p, "gamma": 1.0, "scale": "auto"}
    wanted, _ = merge(pairs, **options)
    close(merge(pairs, dtype=torch.float32, **options)[0], wanted, 1e-4)


def test_half_precision_is_lifted() -> None:
    half = [F.to(torch.bfloat16) for F in as_factors(adapters(14, 12, [2, 3]))]
    found = do_merging(half, weights=[1.0, 1.0], decouple_strength=1.0).tensor
    lifted = do_merging(
        [F.to(torch.float32) for F in half], weights=[1.0, 1.0], decouple_strength=1.0
    ).tensor
    assert found.B.dtype == found.A.dtype == torch.float32
    assert torch.equal(found.dense(), lifted.dense())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_batch_is_its_modules_one_by_one(solver, p) -> None:
    modules = [as_factors(adapters(9, 8, [2, 3, 2], seed)) for seed in range(4)]
    modules[1][1] = Factors(torch.zeros(9, 3).double(), torch.ones(3, 8).double())
    modules[2] = [Factors(F.B * 0, F.A) for F in modules[2]]
    shared = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    modules[3][0], modules[3][2] = (Factors(modules[3][i].B, shared) for i in (0, 2))
    modules[3][1] = Factors(modules[3][1].B, torch.cat([shared, shared[:1]]))
    joined = [
        Factors(torch.stack([m[i].B for m in modules]), torch.stack([m[i].A for m in modules]))
        for i in range(3)
    ]
    options = {"orthogonalise": solver, "decouple_strength": p, "scale": "auto", "steps": 25}
    options |= {"weights": [1.0, -0.5, 2.0], "renormalise": p == 1.0}
    if solver == "adam":
        options["gauge"] = "stored"
    batch = do_merging(joined, **options)
    for at, module in enumerate(modules):
        one = do_merging(module, **options)
        torch.testing.assert_close(
            batch.tensor.dense()[at], one.tensor.dense(), rtol=1e-8, atol=1e-8
        )
        assert batch.facts.keys() == one.facts.keys()
        for key, value in one.facts.items():
            assert float(batch.facts[key][at]) == pytest.approx(value, rel=1e-7, abs=1e-7), key


def test_inputs_are_left_alone() -> None:
    factors = as_factors(adapters(9, 8, [2, 3]))
    before = [(F.B.clone(), F.A.clone()) for F in factors]
    do_merging(factors, weights=[1.0, 1.0], decouple_strength=1.0)
    assert all(
        torch.equal(F.B, B) and torch.equal(F.A, A)
        for F, (B, A) in zip(factors, before, strict=True)
    )


def test_what_is_wrong_is_refused() -> None:
    factors = as_factors(adapters(9, 8, [2, 3]))
    factors[1].A[0, 0] = math.nan
    with pytest.raises(NumericalError, match="adapter 2"):
        do_merging(factors, weights=[1.0, 1.0])
    with pytest.raises(NumericalError, match="one weight"):
        do_merging(factors, weights=[1.0])
    with pytest.raises(NumericalError, match="one shape"):
        do_merging([*factors[:1], *as_factors(adapters(9, 7, [2]))], weights=[1.0, 1.0])


# Registration and nesting.


def test_registration_and_presets() -> None:
    method = get_method("do-merging")
    assert method.space is Space.FACTORS
    assert method.batched
    assert method.parameters["scale"].check("auto") == "auto"
    assert method.parameters["scale"].check(2) == 2.0
    for name, preset in PRESETS.items():
        assert preset.keys() == method.parameters.keys() - {"preset", "op"}
        for key, value in preset.items():
            assert method.parameters[key].check(value) == value
        nulls = dict.fromkeys(preset)
        resolved = resolved_preset({"preset": name, **nulls, "gamma": 3.0, "op": None}, 2)
        assert resolved == {"preset": name, **preset, "gamma": 3.0, "op": None}


def test_the_paper_preset_is_descent_on_stored_factors_with_full_decoupling() -> None:
    pairs = [(0.3 * B, 0.3 * A) for B, A in adapters(10, 8, [2, 2])]
    pairs[1][1][:, 3] = 0.0
    found, _ = merge(pairs, preset="paper", steps=3000, tolerance=1e-11)
    wanted, _ = dense.merge(
        pairs, how="lbfgs", gauge="stored", normalise=False, p=1.0, source="orth", zeros="include",
        cap=math.inf,
    )  # fmt: skip
    close(found, wanted, 1e-5)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_the_nested_method_sees_directions_and_magnitudes_go_back_on(axis) -> None:
    pairs, weights = adapters(14, 12, [2, 3, 2]), [1.0, -0.5, 2.0]
    options = {"decouple_strength": 1.0, "axis": axis, "scale": "auto"}
    op = nested_method("op", {"method": "task-arithmetic"}, Space.FACTORS)
    wanted, _ = merge(pairs, weights, **options)
    close(merge(pairs, weights, op=op, **options)[0], wanted, 1e-10)
    zero = (np.zeros((14, 1)), np.ones((1, 12)))
    mean = {"method": "task-arithmetic", "normalize": True}  # in which a change of zero counts
    op, options = nested_method("op", mean, Space.FACTORS), {**options, "scale": 1.0}
    wanted, _ = merge(pairs, weights, op=op, **options)
    share = sum(weights) / (sum(weights) + 1.0)
    found, _ = merge([*pairs, zero], [*weights, 1.0], op=op, **options)
    close(found, share * wanted, 1e-10)
