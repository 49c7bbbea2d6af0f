"""Hyperspherical energy: oracle O3, brute force, what it does not see, what it leaves out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import exp_so, hyperspherical_energy


def brute_force(W: np.ndarray) -> float:
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
    return float(np.sum(1 / distances[~np.eye(len(W), dtype=bool)]))


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_oracle_o3() -> None:
    rs = np.random.RandomState(7)
    W = rs.standard_normal((12, 8))
    deltas = [0.05 * rs.standard_normal((12, 8)) for _ in range(3)]

    def energy(X: np.ndarray) -> float:
        return hyperspherical_energy(torch.from_numpy(X)).value

    assert energy(W) == pytest.approx(98.21322452589877, rel=1e-14)
    assert energy(W + sum(deltas) / 3) == pytest.approx(98.19890017393624, rel=1e-13)
    experts = [energy(W + D) for D in deltas]
    assert experts == pytest.approx([98.10276140, 97.89828677, 98.60867625], abs=5e-9)


@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(2, 12), st.integers(2, 40))
def test_is_brute_force_and_rotations_leave_it(seed: int, columns: int, rows: int) -> None:
    """P10."""
    W, L = normal(seed, rows, columns), normal(seed + 1, columns, columns)
    value = hyperspherical_energy(W).value
    assert value == pytest.approx(brute_force(W.numpy()), rel=1e-10)
    turned = hyperspherical_energy(W @ exp_so(L - L.mT))
    assert turned.value == pytest.approx(value, rel=1e-10)
    scaled = hyperspherical_energy(W * normal(seed + 2, rows).abs()[:, None])
    assert scaled.value == pytest.approx(value, rel=1e-10)
    assert hyperspherical_energy(W.flip(0)).value == pytest.approx(value, rel=1e-12)


def test_chunks_make_no_difference() -> None:
    W = normal(0, 1100, 4)
    assert hyperspherical_energy(W).value == pytest.approx(brute_force(W.numpy()), rel=1e-10)


def test_zero_rows_are_left_out_and_counted() -> None:
    W = normal(0, 10, 4)
    padded = torch.cat([torch.zeros(2, 4), W, torch.zeros(3, 4)])
    report = hyperspherical_energy(padded)
    assert (report.rows, report.zero_rows) == (10, 5)
    assert report.value == pytest.approx(hyperspherical_energy(W).value, rel=1e-14)
    assert hyperspherical_energy(torch.zeros(3, 4)).value == 0
    assert hyperspherical_energy(1e-200 * W).value == pytest.approx(report.value, rel=1e-12)


def test_coincident_rows_are_left_out_and_counted() -> None:
    W = normal(0, 10, 4)
    report = hyperspherical_energy(torch.cat([W, 2 * W[:1], 3 * W[:1]]))
    assert (report.rows, report.coincident) == (12, 3)
    unit = (W / W.norm(dim=1, keepdim=True)).numpy()
    others = np.sum(1 / np.linalg.norm(unit[1:] - unit[0], axis=1))
    assert report.value == pytest.approx(brute_force(W.numpy()) + 4 * others, rel=1e-12)


@pytest.mark.parametrize(("distance", "left_out"), [(0.9e-6, 1), (1.1e-6, 0), (1e-4, 0)])
def test_near_rows_are_measured_accurately(distance: float, left_out: int) -> None:
    """2 - 2 cos would have four digits left at this distance."""
    W = torch.tensor([[1.0, 0.0], [math.cos(distance), math.sin(distance)]], dtype=torch.float64)
    report = hyperspherical_energy(W)
    assert report.coincident == left_out
    assert report.value == pytest.approx(0 if left_out else 2 / distance, rel=1e-8)


def test_samples_are_seeded_and_take_the_same_rows_of_rotated_weights() -> None:
    W, L = normal(0, 60, 5), normal(1, 5, 5)
    one = hyperspherical_energy(W, max_rows=20)
    assert one.rows == 20
    assert hyperspherical_energy(W, max_rows=20) == one
    assert hyperspherical_energy(W, max_rows=20, seed=1).value != one.value
    turned = hyperspherical_energy(W @ exp_so(L - L.mT), max_rows=20)
    assert turned.value == pytest.approx(one.value, rel=1e-10)
    assert hyperspherical_energy(W, max_rows=60) == hyperspherical_energy(W, max_rows=None)


def test_half_precision_and_refusals() -> None:
    W = normal(0, 6, 4).bfloat16()
    assert hyperspherical_energy(W) == hyperspherical_energy(W.double())
    for bad, message in (
        (torch.full((2, 2), math.nan), "not finite"),
        (torch.zeros(3), "needs a matrix"),
    ):
        with pytest.raises(NumericalError, match=message):
            hyperspherical_energy(bad)
    with pytest.raises(NumericalError, match="two rows"):
        hyperspherical_energy(W, max_rows=1)
