"""Skew matrices added one at a time give the same mean, and only the sum is held."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from orthomerge.errors import NumericalError
from orthomerge.linalg import AlgebraSum, Correction, merge_algebra, unpack_skew

CORRECTIONS = ("layer", "block", "none")


def adapters(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unpack_skew(torch.randn(count, 2, 6, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_one_at_a_time_is_all_at_once(correction: Correction) -> None:
    As, weights = adapters(4), [1.0, 2.0, 0.5, 3.0]
    stacked, expected = merge_algebra(As, weights, 0.7, correction)
    streamed, info = merge_algebra((A for A in As), weights, 0.7, correction)
    assert torch.equal(streamed, stacked)
    assert info == expected
    total = AlgebraSum()
    for A, weight in zip(As, weights, strict=True):
        total.add(A, weight)
    added, info = total.merged(0.7, correction)
    torch.testing.assert_close(added, stacked, atol=1e-14, rtol=0)
    assert info.norms == expected.norms
    assert info.factors == pytest.approx(expected.factors, rel=1e-13)
    assert info.sum_norm == pytest.approx(expected.sum_norm, rel=1e-13)


def test_the_norm_is_the_mean_norm() -> None:
    """P14, for weights that do not sum to 1."""
    total = AlgebraSum()
    for A, weight in zip(adapters(3), (1.0, 2.0, 5.0), strict=True):
        total.add(A, weight)
    merged, info = total.merged()
    norms = [float(A.norm()) for A in adapters(3)]
    expected = (norms[0] + 2 * norms[1] + 5 * norms[2]) / 8
    assert float(merged.norm()) == pytest.approx(expected, rel=1e-13)
    assert info.merged_norm == pytest.approx(expected, rel=1e-13)


def test_opposites_are_zero_and_c_max_holds() -> None:
    """P6 and P7."""
    A = adapters(1)[0]
    total = AlgebraSum()
    total.add(A)
    total.add(-A)
    assert torch.equal(total.merged()[0], torch.zeros_like(A))
    total.add(0.01 * A, 2.0)
    merged, info = total.merged(c_max=3.0)
    assert info.capped == 1
    assert float(merged.norm()) == pytest.approx(3 * info.sum_norm, rel=1e-12)


def test_no_input_is_kept_or_changed() -> None:
    total = AlgebraSum()
    A = adapters(1)[0]
    before, reference = A.clone(), weakref.ref(A)
    total.add(A, 0.5)
    first, _ = total.merged()
    assert torch.equal(A, before)
    total.add(2 * before, 0.5)
    assert torch.equal(A, before)
    torch.testing.assert_close(first, before, atol=1e-15, rtol=0)
    del A
    assert reference() is None


def test_dtypes_widen() -> None:
    total, A = AlgebraSum(), adapters(1)[0]
    total.add(A.bfloat16())
    assert total.merged()[0].dtype == torch.float32
    total.add(A)
    assert total.merged()[0].dtype == torch.float64


def test_bad_sums_are_refused() -> None:
    A, total = adapters(1)[0], AlgebraSum()
    with pytest.raises(NumericalError, match="zero"):
        total.merged()
    for weight in (-1.0, math.nan):
        with pytest.raises(NumericalError, match="weights"):
            total.add(A, weight)
    total.add(A, 0.0)
    with pytest.raises(NumericalError, match="zero"):
        total.merged()
    with pytest.raises(NumericalError, match="shape"):
        total.add(A[0])
    with pytest.raises(NumericalError, match="not finite"):
        total.add(A * math.nan)
    for count in (1, 3):
        with pytest.raises(NumericalError, match="one weight per input"):
            merge_algebra(iter(adapters(2)), [1.0] * count)
