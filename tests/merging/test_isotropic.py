"""iso-c and iso-cts against full singular value decompositions in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orthomerge import merge

FP64 = {"compute_dtype": "float64"}
# Two adapters of rank 2 that are small enough to follow by hand.
D1 = np.array([[1.0, 0, 2], [2, 0, 3], [0, 0, -1]])
D2 = np.array([[1.0, -1, 1], [2, 1, 0], [3, 0, 1]])


def models(*shape: int, count: int = 3, seed: int = 0, rank: int | None = None):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    if rank is None:
        return base, [0.1 * rng.standard_normal(shape) for _ in range(count)]
    rows, columns = shape
    factors = [(rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns)))]
    for _ in range(count - 1):
        factors.append((rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))))
    return base, [0.1 * B @ A for B, A in factors]


def update(method, base, deltas, *, name="layers.0.up.weight", dtype=torch.float64, **settings):
    result = merge(
        [{name: torch.tensor(base + D, dtype=dtype)} for D in deltas],
        base={name: torch.tensor(base, dtype=dtype)},
        method=method,
        **{"run_settings": FP64, **settings},
    )
    return result.tensors[name].double().numpy() - torch.tensor(base, dtype=dtype).double().numpy()


def polar(M):
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    kept = s > 1e-10 * max(s.max(initial=0.0), 1e-300)
    return U[:, kept] @ Vh[kept]


def rank_of(s, size):
    return int((s > 1e-6 * size).sum())


def iso_c(deltas, weights):
    U, s, Vh = np.linalg.svd(sum(w * D for w, D in zip(weights, deltas, strict=True)))
    q = rank_of(s, s[0])
    return s[:q].mean() * U[:, :q] @ Vh[:q]


def iso_cts(deltas, weights, common=0.8):
    tasks = [w * D for w, D in zip(weights, deltas, strict=True) if (w * D).any()]
    U, s, Vh = np.linalg.svd(sum(tasks))
    q, T = rank_of(s, s[0]), len(tasks)
    own = math.floor((1 - common) * q / T + 1e-9)
    k = q - own * T
    left, values, right = [U[:, :k]], [s[:k]], [Vh[:k].T]
    for task in tasks:
        P, z, Qh = np.linalg.svd(task - left[0] @ left[0].T @ task)
        r = min(own, rank_of(z, np.linalg.norm(task)))
        left.append(P[:, :r])
        values.append(z[:r])
        right.append(Qh[:r].T)
    strength = np.concatenate(values).mean()
    return strength * polar(np.concatenate(left, 1)) @ polar(np.concatenate(right, 1)).T


ORACLES = {"iso-c": iso_c, "iso-cts": iso_cts}
both = pytest.mark.parametrize("method", ORACLES)


def test_two_small_adapters() -> None:
    """Numbers found once by hand and by an independent program, to five digits."""
    found = update("iso-c", np.zeros((3, 3)), [D1, D2])
    wanted = [[0.5483, -2.3453, 2.3021], [1.7731, 2.1762, 1.7947], [2.7670, -0.9298, -1.6063]]
    np.testing.assert_allclose(found, wanted, atol=6e-5)
    np.testing.assert_allclose(np.linalg.svd(found)[1], [3.33175] * 3, atol=6e-6)
    found = update("tsv-m", np.zeros((3, 3)), [D1, D2])
    wanted = [[1.0546, -0.0065, 1.9761], [1.7453, -0.0070, 3.1713], [3.3279, 0.2945, -2.1544]]
    np.testing.assert_allclose(found, wanted, atol=6e-5)
    found = update("ties", np.zeros((3, 3)), [D1, D2], density=1)
    np.testing.assert_allclose(found, [[1, -1, 1.5], [2, 1, 3], [3, 0, 1]])


@both
@pytest.mark.parametrize("shape", [(12, 12), (30, 16), (14, 40), (6, 1), (1, 6)])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5], [1.0, -0.5, 2.0]])
def test_equals_the_oracle(method, shape, weights) -> None:
    base, deltas = models(*shape, count=len(weights))
    found = update(method, base, deltas, weights=weights, scale=0.7)
    np.testing.assert_allclose(found, 0.7 * ORACLES[method](deltas, weights), atol=1e-11)


@both
def test_sums_of_low_rank_stay_of_low_rank_and_become_flat(method) -> None:
    base, deltas = models(30, 40, rank=3, count=4)
    found = update(method, base, deltas)
    np.testing.assert_allclose(found, ORACLES[method](deltas, [1.0] * 4), atol=1e-11)
    s = np.linalg.svd(found)[1]
    np.testing.assert_allclose(s[:12], s[0], rtol=1e-9)
    assert s[12] < 1e-9 * s[0]


@both
def test_no_energy_goes_into_rounding_noise(method) -> None:
    """In fp32 a product B A has full rank by rounding alone, a few 1e-8 of its size."""
    base, deltas = models(40, 30, rank=2, count=2)
    deltas = [D.astype(np.float32).astype(np.float64) for D in deltas]
    found = update(method, 0 * base, deltas, dtype=torch.float32, run_settings={})
    s = np.linalg.svd(found)[1]
    assert s[4] < 1e-5 * s[0]
    np.testing.assert_allclose(found, ORACLES[method](deltas, [1.0] * 2), atol=1e-5)


@both
def test_weak_directions_are_made_as_strong_as_the_others(method) -> None:
    """Singular values over five decades: the update is still flat to fp32's accuracy."""
    rng = np.random.default_rng(3)
    U, V = (np.linalg.qr(rng.standard_normal((20, 20)))[0] for _ in range(2))
    D = (U * np.logspace(0, -5, 20)) @ V.T
    found = update(method, np.zeros((20, 20)), [D])
    np.testing.assert_allclose(found, ORACLES[method]([D], [1.0]), atol=1e-7)


@both
def test_directions_below_a_millionth_of_the_strongest_stay_out(method) -> None:
    found = update(method, np.zeros((3, 3)), [np.diag([1.0, 2e-6, 3e-7])])
    np.testing.assert_allclose(found, np.diag([1.0, 1.0, 0.0]) * (1 + 2e-6) / 2, atol=1e-12)


def test_the_spectrum_is_flat_down_to_the_weakest_direction() -> None:
    """The Gram matrix alone gives the weakest right vectors only nearly orthonormal."""
    rng = np.random.default_rng(5)
    U, V = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in range(2))
    D = (U * np.logspace(0, -5.9, 60)) @ V.T
    s = np.linalg.svd(update("iso-c", np.zeros((60, 60)), [D]))[1]
    assert s[0] / s[-1] - 1 < 1e-8


def test_a_task_that_the_common_directions_hold_adds_no_noise() -> None:
    """What is left of the strong task is rounding: it has no direction of its own to give."""
    rng = np.random.default_rng(2)
    U, V = (np.linalg.qr(rng.standard_normal((12, 12)))[0] for _ in range(2))
    strong, other = 10 * np.outer(U[:, 0], V[:, 0]), (U[:, 1:4] * [3, 2, 1]) @ V[:, 1:4].T
    found = update("iso-cts", np.zeros((12, 12)), [strong, other], common=0.5)
    s = np.linalg.svd(found)[1]
    np.testing.assert_allclose(s[:3], (10 + 3 + 2) / 3)  # two common directions, one of the other
    assert s[3] < 1e-9


def test_common_directions_alone_are_iso_c() -> None:
    base, deltas = models(15, 20)
    found = update("iso-cts", base, deltas, common=1)
    np.testing.assert_allclose(found, update("iso-c", base, deltas), atol=1e-13)


def test_a_task_with_a_direction_of_its_own_is_heard() -> None:
    """Two strong tasks share all directions of the sum's head; the third is weak and apart."""
    rng = np.random.default_rng(1)
    U, V = (np.linalg.qr(rng.standard_normal((10, 10)))[0] for _ in range(2))
    shared = (U[:, :9] * np.linspace(3, 2, 9)) @ V[:, :9].T
    alone = 0.1 * np.outer(U[:, 9], V[:, 9])
    deltas = [shared, 0.5 * shared, alone]
    found = update("iso-cts", np.zeros((10, 10)), deltas, common=0.7)
    np.testing.assert_allclose(found, iso_cts(deltas, [1.0] * 3, 0.7), atol=1e-11)
    s = np.linalg.svd(found)[1]
    assert U[:, 9] @ found @ V[:, 9] == pytest.approx(s[0])


@both
def test_a_model_without_a_change_is_an_absent_model(method) -> None:
    base, deltas = models(12, 15, count=2)
    found = update(method, base, [deltas[0], 0 * deltas[0], deltas[1]])
    np.testing.assert_allclose(found, update(method, base, deltas), atol=1e-13)


@both
def test_no_change_at_all_is_the_base_bit_for_bit(method) -> None:
    base, _ = models(8, 5)
    assert (update(method, base, [0 * base, 0 * base]) == 0).all()
    assert (update(method, base, [base, base], weights=[0, 0]) == 0).all()
    assert (update(method, 0 * base, [base, -base]) == 0).all()


@both
@pytest.mark.parametrize("shape", [(7,), ()])
def test_vectors_and_scalars_get_the_weighted_mean(method, shape) -> None:
    base, deltas = models(*shape)
    wanted = 0.5 * sum(w * D for w, D in zip([1, 2, -1], deltas, strict=True)) / 3
    found = update(method, base, deltas, weights=[1.0, 2.0, -1.0], scale=0.5)
    np.testing.assert_allclose(found, wanted, atol=1e-13)


@both
def test_convolutions_are_matrices_and_stacks_are_many(method) -> None:
    base, deltas = models(6, 3, 2, 2)
    flat = ORACLES[method]([D.reshape(6, 12) for D in deltas], [1.0] * 3)
    found = update(method, base, deltas, name="conv.weight")
    np.testing.assert_allclose(found, flat.reshape(base.shape), atol=1e-12)
    base, deltas = models(4, 6, 5)
    each = [ORACLES[method]([D[at] for D in deltas], [1.0] * 3) for at in range(4)]
    found = update(method, base, deltas, name="layers.0.mlp.experts.up_proj")
    np.testing.assert_allclose(found, np.stack(each), atol=1e-12)
