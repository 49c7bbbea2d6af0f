"""TSV-M against full singular value decompositions in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthomerge import merge

FP64 = {"compute_dtype": "float64"}


def models(*shape: int, count: int = 3, seed: int = 0, spread: float = 0.1):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base, [base + spread * rng.standard_normal(shape) for _ in range(count)]


def merged(base, experts, *, name="layers.0.up.weight", dtype=torch.float64, **settings):
    result = merge(
        [{name: torch.tensor(W, dtype=dtype)} for W in experts],
        base={name: torch.tensor(base, dtype=dtype)},
        method="tsv-m",
        **{"run_settings": FP64, **settings},
    )
    return result.tensors[name].double().numpy()


def polar(M):
    """Nearest matrix with orthonormal columns (or rows); directions of size zero dropped."""
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    kept = s > 1e-12 * max(s.max(), 1e-300)
    return U[:, kept] @ Vh[kept]


def oracle(deltas, weights=None, scale=1.0):
    T = len(deltas)
    weights = weights or [1.0] * T
    left, values, right = [], [], []
    for D, weight in zip(deltas, weights, strict=True):
        U, s, Vh = np.linalg.svd(D, full_matrices=False)
        r = max(1, len(s) // T)
        left.append(U[:, :r])
        values.append(weight * s[:r])
        right.append(Vh[:r].T)
    U, V = polar(np.concatenate(left, 1)), polar(np.concatenate(right, 1))
    return scale * (U * np.concatenate(values)) @ V.T


@pytest.mark.parametrize("shape", [(12, 12), (15, 8), (7, 16), (6, 1), (1, 6)])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_equals_the_oracle(shape, count) -> None:
    base, experts = models(*shape, count=count)
    wanted = base + oracle([W - base for W in experts])
    np.testing.assert_allclose(merged(base, experts), wanted, atol=1e-12)


def test_fp32_is_close_to_the_oracle() -> None:
    base, experts = models(24, 16)
    found = merged(base, experts, dtype=torch.float32, run_settings={})
    np.testing.assert_allclose(found, base + oracle([W - base for W in experts]), atol=2e-6)


def test_bf16_is_the_oracle_rounded_once() -> None:
    base, experts = models(24, 16)
    base, *experts = (torch.tensor(W).bfloat16().double().numpy() for W in (base, *experts))
    found = merged(base, experts, dtype=torch.bfloat16, run_settings={})
    wanted = torch.tensor(base + oracle([W - base for W in experts])).bfloat16().double().numpy()
    differs = found != wanted
    assert differs.mean() < 0.01
    assert (np.abs(found - wanted)[differs] <= np.abs(wanted[differs]) * 2**-7).all()


def test_weights_scale_the_singular_values_and_not_the_frames() -> None:
    base, experts = models(12, 9)
    weights = [0.5, 2.0, -0.75]
    wanted = base + oracle([W - base for W in experts], weights, 0.7)
    found = merged(base, experts, weights=weights, scale=0.7)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_one_model_is_itself() -> None:
    base, experts = models(9, 14, count=1)
    np.testing.assert_allclose(merged(base, experts), experts[0], atol=1e-13)


def test_identical_models_add_up_to_the_truncated_change() -> None:
    """Equal frames coincide, so their polar factor is the frame over √T on either side: the sum of
    T equal terms over T. What is cut off is the tail beyond rank ⌊n / T⌋."""
    base, (W,) = models(12, 8, count=1)
    U, s, Vh = np.linalg.svd(W - base, full_matrices=False)
    wanted = base + (U[:, :4] * s[:4]) @ Vh[:4]
    np.testing.assert_allclose(merged(base, [W, W]), wanted, atol=1e-9)


def test_orthogonal_tasks_are_summed_exactly() -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal((10, 8))
    U, V = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (10, 8))
    parts = [(U[:, at : at + 2] * [3.0 + at, 1.0]) @ V[:, at : at + 2].T for at in (0, 2, 4, 6)]
    found = merged(base, [base + D for D in parts])
    np.testing.assert_allclose(found, base + sum(parts), atol=1e-12)


def test_rank_deficient_changes() -> None:
    """Rank one of a possible four is kept; the noise directions behind it must not matter."""
    rng = np.random.default_rng(4)
    base = rng.standard_normal((10, 8))
    u, v = rng.standard_normal((2, 10)), rng.standard_normal((2, 8))
    deltas = [np.outer(u[i], v[i]) for i in range(2)]
    found = merged(base, [base + D for D in deltas]) - base
    assert np.isfinite(found).all()
    # Only the frames of the directions that carry something are made orthogonal.
    s = [np.linalg.norm(u[i]) * np.linalg.norm(v[i]) for i in range(2)]
    P = polar(np.stack([u[i] / np.linalg.norm(u[i]) for i in range(2)], 1))
    Q = polar(np.stack([v[i] / np.linalg.norm(v[i]) for i in range(2)], 1))
    np.testing.assert_allclose(found, (P * s) @ Q.T, atol=1e-10)


def test_more_models_than_directions() -> None:
    """T > min(o, n): one direction each; the wide stack's polar factor has orthonormal rows."""
    base, experts = models(3, 6, count=5)
    wanted = base + oracle([W - base for W in experts])
    np.testing.assert_allclose(merged(base, experts), wanted, atol=1e-12)


def test_zero_change_contributes_nothing_and_takes_no_room() -> None:
    base, (W, _) = models(8, 8, count=2)
    np.testing.assert_allclose(merged(base, [W, base]), W, atol=1e-10)


@pytest.mark.parametrize("ranks", [(1, 6), (3, 4), (7, 2), (4, 4)])
def test_changes_of_low_rank_keep_all_directions_where_there_is_room(ranks) -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal((9, 7))
    deltas = [rng.standard_normal((9, r)) @ rng.standard_normal((r, 7)) for r in ranks]
    kept = ranks if sum(ranks) <= 7 else (3, 3)
    left, values, right = [], [], []
    for D, r in zip(deltas, kept, strict=True):
        U, s, Vh = np.linalg.svd(D)
        r = min(r, np.linalg.matrix_rank(D))
        left.append(U[:, :r])
        values.append(s[:r])
        right.append(Vh[:r].T)
    U, V = polar(np.concatenate(left, 1)), polar(np.concatenate(right, 1))
    wanted = base + (U * np.concatenate(values)) @ V.T
    np.testing.assert_allclose(merged(base, [base + D for D in deltas]), wanted, atol=1e-6)


def test_no_change_at_all_is_the_base_bit_for_bit() -> None:
    base, _ = models(8, 5)
    assert (merged(base, [base, base]) == base).all()


@pytest.mark.parametrize("shape", [(7,), ()])
def test_vectors_and_scalars_get_the_weighted_sum_over_the_number_of_models(shape) -> None:
    base, experts = models(*shape)
    wanted = base + 0.5 * sum(w * (W - base) for w, W in zip([1, 2, -1], experts, strict=True)) / 3
    found = merged(base, experts, weights=[1.0, 2.0, -1.0], scale=0.5)
    np.testing.assert_allclose(found, wanted, atol=1e-13)


def test_convolutions_are_matrices_and_stacks_are_many() -> None:
    base, experts = models(6, 3, 2, 2)
    flat = oracle([(W - base).reshape(6, 12) for W in experts])
    found = merged(base, experts, name="conv.weight")
    np.testing.assert_allclose(found, base + flat.reshape(base.shape), atol=1e-12)
    base, experts = models(4, 6, 5)
    each = [oracle([W[at] - base[at] for W in experts]) for at in range(4)]
    found = merged(base, experts, name="layers.0.mlp.experts.up_proj")
    np.testing.assert_allclose(found, base + np.stack(each), atol=1e-12)
