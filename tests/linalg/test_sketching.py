"""A sketch is the product seen through random signs, and tells matrices apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthomerge.linalg.factors import (
    Factors,
    gram,
    singular_values,
    truncated,
    truncated_with_values,
)
from orthomerge.linalg.sketching import sketch


def random_factors(o: int, r: int, n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Factors:
    stream = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(*batch, o, r, generator=stream), torch.randn(*batch, r, n, generator=stream)
    )


def test_a_sketch_depends_on_the_product_alone() -> None:
    F = random_factors(60, 5, 40)
    M = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)) + 5 * torch.eye(5)
    same = Factors(F.B @ torch.linalg.inv(M), M @ F.A)
    assert torch.allclose(sketch(F), sketch(same), atol=1e-4)


def test_its_size_is_about_the_norm() -> None:
    sizes = [
        float(torch.linalg.norm(sketch(F)) / np.linalg.norm(F.dense().numpy()))
        for F in (random_factors(200, 8, 300, seed) for seed in range(40))
    ]
    assert 0.85 < np.sqrt(np.mean(np.square(sizes))) < 1.15


@pytest.mark.parametrize("change", ["sign", "rows", "columns", "scale"])
def test_what_a_norm_does_not_notice_is_noticed(change: str) -> None:
    F = random_factors(60, 5, 40)
    other = {
        "sign": Factors(-F.B, F.A),
        "rows": Factors(F.B.flip(0), F.A),
        "columns": Factors(F.B, F.A.flip(1)),
        "scale": Factors(1.01 * F.B, F.A),
    }[change]
    difference = torch.linalg.norm(sketch(F) - sketch(other)) / torch.linalg.norm(sketch(F))
    assert difference > 0.005


def test_a_batch_is_sketched_one_by_one() -> None:
    F = random_factors(20, 3, 30, batch=(4,))
    for at in range(4):
        assert torch.allclose(sketch(F)[at], sketch(Factors(F.B[at], F.A[at])), atol=1e-5)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(("rank", "columns"), [(3, 10), (64, 2048), (65, 2049), (130, 5000)])
def test_a_large_gram_matrix_is_that_of_fp64(
    rank: int, columns: int, batch: tuple[int, ...]
) -> None:
    X = random_factors(1, rank, columns, batch=batch).A
    rows = X.double().numpy()
    expected = rows @ np.swapaxes(rows, -1, -2)
    found = gram(X)
    assert np.abs(found.numpy() - expected).max() < 1e-11 * columns
    turned = X.mT.contiguous().mT  # columns of a left factor
    assert np.abs(gram(turned).numpy() - expected).max() < 1e-11 * columns
    if rank > 64:
        assert torch.equal(found, found.mT)


def test_truncation_tells_every_singular_value() -> None:
    F = random_factors(50, 6, 40)
    kept, values = truncated_with_values(F, 2)
    assert torch.equal(kept.dense(), truncated(F, 2).dense())
    assert torch.equal(values, singular_values(F))
    assert values.numpy() == pytest.approx(
        np.linalg.svd(F.dense().double().numpy(), compute_uv=False)[:6], rel=1e-5
    )
