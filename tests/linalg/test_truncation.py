"""Truncated SVDs against numpy's full one: error, rank by energy, floor, sketch, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg import truncated_svd


def matrix(o: int, n: int, values: np.ndarray, seed: int = 0) -> torch.Tensor:
    random = np.random.RandomState(seed)
    k = len(values)
    U, V = (np.linalg.qr(random.standard_normal((m, k)))[0] for m in (o, n))
    return torch.from_numpy((U * values) @ V.T)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (300, 320), (500, 280)])
@pytest.mark.parametrize("rank", [1, 3])
def test_error_is_the_best_one(shape: tuple[int, int], rank: int) -> None:
    D = torch.from_numpy(np.random.RandomState(1).standard_normal(shape))
    found = truncated_svd(D, rank)
    s = np.linalg.svd(D.numpy(), compute_uv=False)
    best = float(np.sqrt((s[rank:] ** 2).sum()))
    measured = np.linalg.norm(D.numpy() - found.B.numpy() @ found.A.numpy())
    assert found.error == pytest.approx(measured, abs=1e-12)
    assert found.error <= 1.01 * best + 1e-12
    assert found.error >= best - 1e-9
    assert (found.iterations > 0) == (min(shape) > 256)


def test_a_sketch_finds_low_rank_exactly_and_repeats_itself() -> None:
    D = matrix(400, 380, np.array([5.0, 2.0, 1.0]))
    first, second = truncated_svd(D, 8, floor=1e-9, seed=4), truncated_svd(D, 8, floor=1e-9, seed=4)
    assert first.iterations > 0
    assert first.rank == 3
    assert first.error < 1e-10
    np.testing.assert_allclose(first.values.numpy(), [5, 2, 1], rtol=1e-10)
    assert torch.equal(first.B, second.B)
    balance = torch.linalg.vector_norm(first.B) / torch.linalg.vector_norm(first.A)
    assert float(balance) == pytest.approx(1)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (1.0, 2)])
@pytest.mark.parametrize("size", [6, 300])
def test_energy_decides_the_rank(energy: float, rank: int, size: int) -> None:
    D = matrix(size, size, np.array([0.8, 0.6]))
    assert truncated_svd(D, None if size == 6 else 5, energy=energy).rank == rank


def test_half_precision_is_lifted_and_zero_has_no_rank() -> None:
    found = truncated_svd(torch.ones(3, 4, dtype=torch.bfloat16), 2, floor=1e-6)
    assert (found.rank, found.B.dtype) == (1, torch.float32)
    assert truncated_svd(torch.zeros(3, 4), 2).rank == 0


@pytest.mark.parametrize(
    ("D", "options"),
    [
        (torch.full((2, 2), torch.nan), {"rank": 1}),
        (torch.ones(2, 2, 2), {"rank": 1}),
        (torch.ones(2, 2), {"rank": 0}),
        (torch.ones(2, 2), {"rank": 1, "energy": 0.0}),
        (torch.ones(2, 2), {"rank": 1, "energy": 1.1}),
    ],
)
def test_bad_input_is_refused(D: torch.Tensor, options: dict[str, float]) -> None:
    with pytest.raises(NumericalError):
        truncated_svd(D, **options)
