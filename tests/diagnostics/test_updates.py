"""Comparisons of low-rank updates against the same numbers of the dense matrices, in fp64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from orthomerge.diagnostics import compare_updates, compared
from orthomerge.diagnostics.update_numbers import effective_rank, kept_energy
from orthomerge.diagnostics.updates import with_rank
from orthomerge.errors import NumericalError
from orthomerge.linalg.factors import Factors, concatenated
from orthomerge.merging.registry import get_method

SHAPE, RANKS, SCALES = (14, 18), (3, 2, 4), (100.0, 1.0, 3.0)


def draw(seed: int, dtype=torch.float64, shape=SHAPE, scales=SCALES) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    o, n = shape
    return [Factors(c * normal(o, r), normal(r, n)) for r, c in zip(RANKS, scales, strict=True)]


def dense(factors) -> list[np.ndarray]:
    return [F.B.double().numpy() @ F.A.double().numpy() for F in factors]


def cosine(X: np.ndarray, Y: np.ndarray) -> float:
    return float((X * Y).sum() / np.linalg.norm(X) / np.linalg.norm(Y))


def relative_variance(values: np.ndarray, axis: int = 0) -> np.ndarray:
    return values.var(axis) / values.mean(axis) ** 2


def half(D: np.ndarray, rank: int, side: str) -> np.ndarray:
    """Return one balanced factor as rows: of A, or the columns of B."""
    U, s, Vt = np.linalg.svd(D)
    rows = Vt[:rank] if side == "A" else U.T[:rank]
    return np.sqrt(s[:rank])[:, None] * rows


def overlap(rows: list[np.ndarray]) -> float:
    square = {
        (i, j): ((a @ b.T) ** 2).sum() for i, a in enumerate(rows) for j, b in enumerate(rows)
    }
    outside = sum(value for (i, j), value in square.items() if i != j)
    return float(np.sqrt(outside / sum(square[i, i] for i in range(len(rows)))))


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def factors(request) -> list[Factors]:
    return draw(0, request.param)


def close(found, wanted, tolerance=2e-6) -> None:
    np.testing.assert_allclose(np.array(found, float), wanted, rtol=tolerance, atol=tolerance)


def test_sizes_and_magnitudes_are_those_of_the_dense_matrices(factors) -> None:
    found, D = compare_updates("q", factors), dense(factors)
    f = np.array([np.sqrt((X**2).mean()) for X in D])
    close(np.array(found.sizes) / f, 1.0)
    close(found.shares, f**2 / (f**2).sum())
    close(found.imbalance / (f.max() / f.min()), 1.0)
    close(found.mv, relative_variance(f))
    alpha = np.array([np.linalg.norm(X, axis=0) for X in D])
    close(found.mv_columns, relative_variance(alpha).mean())
    close(found.mv_within, relative_variance(alpha, axis=1))
    assert (found.shape, found.ranks) == (SHAPE, RANKS)


def test_cosines_and_alignment_are_those_of_the_dense_matrices(factors) -> None:
    weights = (0.5, -2.0, 7.0)
    merged = draw(5, factors[0].B.dtype)[2]
    found, D = compare_updates("q", factors, weights=weights, merged=merged), dense(factors)
    close(found.cosines, [[cosine(X, Y) for Y in D] for X in D])
    total = sum(w * X for w, X in zip(weights, D, strict=True))
    close(found.sum_alignment, [cosine(w * X, total) for w, X in zip(weights, D, strict=True)])
    (T,) = dense([merged])
    close(found.alignment, [cosine(w * X, T) for w, X in zip(weights, D, strict=True)])
    assert found.least_alignment == min(found.alignment)


@pytest.mark.parametrize("side", ["A", "B"])
def test_overlaps_and_frames_are_those_of_the_balanced_factors(factors, side) -> None:
    found, D = getattr(compare_updates("q", factors), side), dense(factors)
    rows = [half(X, r, side) for X, r in zip(D, RANKS, strict=True)]
    close(found.overlap, overlap(rows))
    even = [half(X / np.linalg.norm(X), r, side) for X, r in zip(D, RANKS, strict=True)]
    close(found.even_overlap, overlap(even))
    cosines = [np.cos(subspace_angles(a.T, b.T)) for a, b in itertools.combinations(rows, 2)]
    close(found.principal_cosine, np.concatenate(cosines).mean())
    d = SHAPE[side == "A"]
    chance = (2 * np.sqrt(3 / d) + 3 * np.sqrt(4 / d) + 2 * np.sqrt(4 / d)) / 7
    close(found.chance, chance)


def test_overlaps_do_not_depend_on_how_training_split_the_factors() -> None:
    generator = torch.Generator().manual_seed(3)
    plain = draw(1)
    turned = []
    for F in plain:
        M = torch.randn(F.rank, F.rank, generator=generator, dtype=torch.float64)
        turned.append(Factors(F.B @ torch.linalg.inv(M), M @ F.A))
    one, other = compare_updates("q", plain), compare_updates("q", turned)
    for side in ("A", "B"):
        a, b = getattr(one, side), getattr(other, side)
        close(a.overlap, b.overlap, 1e-9)
        close(a.principal_cosine, b.principal_cosine, 1e-9)


def test_a_quiet_adapter_inside_a_loud_one_shows_only_at_equal_size() -> None:
    loud = draw(1)[0]
    quiet = Factors(loud.B * 1e-3, loud.A)
    found = compare_updates("q", [loud, quiet])
    assert found.A.overlap < 0.05
    close(found.A.even_overlap, 1.0, 1e-9)
    close(found.A.principal_cosine, 1.0, 1e-9)


def test_chance_is_what_unrelated_frames_have() -> None:
    found = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        pair = [
            Factors(
                torch.randn(200, 1, generator=generator), torch.randn(1, 300, generator=generator)
            )
            for _ in range(8)
        ]
        found.append(compare_updates("q", pair).A)
    # One direction each: E|cos| = sqrt(2 / (pi d)), 0.8 of the root mean square.
    assert np.mean([side.principal_cosine for side in found]) == pytest.approx(
        np.sqrt(2 / np.pi) * found[0].chance, rel=0.05
    )


def test_spectrum_of_the_merged_update(factors) -> None:
    merged = concatenated(factors)
    s = np.linalg.svd(sum(dense(factors)), compute_uv=False)
    p = s[:9] ** 2 / (s[:9] ** 2).sum()
    found = with_rank(compare_updates("q", factors, merged=merged), 3)
    close(found.effective_rank, np.exp(-(p * np.log(p)).sum()))
    close(found.energy, p[:3].sum())
    assert found.rank == 3
    assert with_rank(found, None).energy is None


def test_numbers_of_nothing() -> None:
    assert effective_rank([]) is None
    assert effective_rank([0.0]) is None
    assert kept_energy([0.0], 1) is None


def test_adapters_that_lack_the_module_or_are_untrained_take_no_part() -> None:
    one, two, _ = draw(2)
    untrained = Factors(torch.zeros_like(two.B), two.A)
    found = compare_updates("q", [one, None, untrained, two])
    alone = compare_updates("q", [one, two])
    assert found.ranks == (3, 0, 2, 2)
    assert found.sizes[1] == found.sizes[2] == 0
    assert found.cosines[0][1] is found.cosines[2][0] is found.sum_alignment[2] is None
    for name in ("imbalance", "mv", "mv_columns"):
        close(getattr(found, name), getattr(alone, name), 1e-12)
    close([found.mv_within[0], found.mv_within[3]], alone.mv_within, 1e-12)
    assert found.mv_within[1] is found.mv_within[2] is None
    for side in ("A", "B"):
        for name in ("overlap", "even_overlap", "principal_cosine", "chance"):
            close(getattr(getattr(found, side), name), getattr(getattr(alone, side), name), 1e-9)


def test_a_single_update_has_nobody_to_compare_with() -> None:
    found = compare_updates("q", [draw(2)[0]], facts={"drift_A": 0.0})
    assert (found.imbalance, found.mv, found.mv_columns, found.A.overlap) == (None,) * 4
    assert found.A.drift == 0.0
    close(found.sum_alignment, [1.0], 1e-12)


def test_updates_that_cancel_have_no_direction() -> None:
    F = draw(2)[0]
    found = compare_updates("q", [F, F], weights=[1.0, -1.0])
    assert found.sum_alignment == (None, None)


def test_totals_are_those_of_all_modules_as_one_vector() -> None:
    parts = [draw(seed, shape=shape) for seed, shape in ((0, (14, 18)), (1, (8, 20)))]
    weights = [(1.0, 2.0, -1.0), (3.0, 1.0, -1.0)]
    taus = [draw(9, shape=(14, 18))[0], draw(8, shape=(8, 20))[2]]
    modules = [
        with_rank(compare_updates(str(at), F, weights=w, merged=t), 2)
        for at, (F, w, t) in enumerate(zip(parts, weights, taus, strict=True))
    ]
    total = compared(["a", "b", "c"], modules).total
    D = [np.concatenate([dense(F)[at].ravel() for F in parts]) for at in range(3)]
    f = np.array([np.sqrt((X**2).mean()) for X in D])
    close(total.sizes, f, 1e-9)
    close(total.imbalance, f.max() / f.min(), 1e-9)
    close(total.cosines, [[cosine(X, Y) for Y in D] for X in D], 1e-9)
    plain = np.concatenate(
        [
            sum(w * X for w, X in zip(ws, dense(F), strict=True)).ravel()
            for ws, F in zip(weights, parts, strict=True)
        ]
    )
    close(total.sum_alignment, [cosine(s * X, plain) for s, X in zip((1, 1, -1), D, strict=True)])
    T = np.concatenate([dense([t])[0].ravel() for t in taus])
    close(total.alignment, [cosine(s * X, T) for s, X in zip((1, 1, -1), D, strict=True)], 1e-9)
    squares = [np.linalg.svd(dense([t])[0], compute_uv=False) ** 2 for t in taus]
    kept = sum(s[:2].sum() for s in squares) / sum(s.sum() for s in squares)
    close(total.energy, kept, 1e-9)
    assert total.least_energy == min(m.energy for m in modules)
    close(total.mv_columns, np.mean([m.mv_columns for m in modules]), 1e-12)
    assert total.scale is None


def test_what_does_not_fit_is_refused() -> None:
    F = draw(0)
    with pytest.raises(NumericalError, match="one weight per adapter"):
        compare_updates("q", F, weights=[1.0])
    with pytest.raises(NumericalError, match="'q': no adapter changes"):
        compare_updates("q", [None, None])
    with pytest.raises(NumericalError, match="over all adapters"):
        compared(["a", "b"], [compare_updates("q", F)])
    with pytest.raises(NumericalError, match="over all adapters"):
        compared(["a", "b"], [])


def merged_by(method: str, factors, **parameters) -> Factors:
    entry = get_method(method)
    given = {key: parameter.default for key, parameter in entry.parameters.items()} | parameters
    result = entry.call_on_factors(factors, weights=[1.0] * len(factors), **given)
    return result.tensor


def test_a_loud_adapter_owns_the_sum_until_magnitudes_are_decoupled() -> None:
    """Three random updates of rank 3, 2, 4, the first a hundred times as loud."""
    factors = draw(0, scales=(100.0, 1.0, 1.0))
    D = dense(factors)
    alpha = [np.linalg.norm(X, axis=0) for X in D]
    directions = sum(X / a for X, a in zip(D, alpha, strict=True))
    decoupled = directions * np.mean(alpha, axis=0)
    off = {"orthogonalise": "none", "decouple_strength": 1.0}
    found = compare_updates("q", factors, merged=merged_by("do-merging", factors, **off))
    assert found.sum_alignment[0] > 0.999
    assert max(map(abs, found.sum_alignment[1:])) < 0.25
    close(found.alignment, [cosine(X, decoupled) for X in D], 1e-6)
    assert all(0.35 < c < 0.75 for c in found.alignment)
    mild = {"orthogonalise": "lbfgs", "gamma": 10.0, "decouple_strength": 1.0}
    both = compare_updates("q", factors, merged=merged_by("do-merging", factors, **mild))
    assert all(0.35 < c < 0.75 for c in both.alignment)
    default = compare_updates("q", factors, merged=merged_by("do-merging", factors))
    assert default.least_alignment < 0.1
