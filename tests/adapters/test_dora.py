"""DoRA's exact split: against the formula written out, in double precision and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthomerge.adapters import dora
from orthomerge.adapters.dora import (
    dora_left_factor,
    dora_magnitudes,
    dora_scales,
    low_rank_row_norms,
)
from orthomerge.errors import AdapterError, NumericalError


def problem(
    *lead: int, o: int = 6, n: int = 9, r: int = 2, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    return normal(o, n), normal(o).abs() + 0.1, normal(o, r), normal(r, n)


def written_out(W0: torch.Tensor, m: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> np.ndarray:
    """PEFT's weight, in numpy."""
    V = W0.numpy() + B.numpy() @ A.numpy()
    return m.numpy()[..., None] * V / np.sqrt((V**2).sum(-1, keepdims=True))


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
def test_the_split_is_doras_weight(lead: tuple[int, ...]) -> None:
    W0, m, B, A = problem(*lead)
    D = dora_scales(W0, m, B, A)
    assert (D.shape, D.dtype) == (m.shape, torch.float64)
    change = (D[..., None] - 1) * W0 + (D[..., None] * B) @ A
    np.testing.assert_allclose(W0 + change, written_out(W0, m, B, A), atol=1e-14, rtol=0)


@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
def test_merged_diagonals_and_factors_become_one_adapter(lead: tuple[int, ...]) -> None:
    """Two DoRA adapters, averaged in both parts, written as a DoRA adapter: the same weight."""
    W0, m1, B1, A1 = problem(*lead)
    _, m2, B2, A2 = problem(*lead, r=3, seed=1)
    D1, D2 = dora_scales(W0, m1, B1, A1), dora_scales(W0, m2, B2, A2)
    D = 1 + 0.7 * (D1 - 1) + 0.5 * (D2 - 1)
    D[..., 0] *= -1  # a sign is a magnitude's business
    B = torch.cat([0.7 * D1[..., None] * B1, 0.5 * D2[..., None] * B2], -1)
    A = torch.cat([A1, A2], -2)
    made = written_out(W0, dora_magnitudes(D, W0, B, A), dora_left_factor(D, B), A)
    wanted = D.numpy()[..., None] * W0.numpy() + B.numpy() @ A.numpy()
    np.testing.assert_allclose(made, wanted, atol=1e-14, rtol=1e-14)


def test_ones_are_plain_lora() -> None:
    W0, _, B, A = problem()
    m = dora_magnitudes(torch.ones(6), W0, B, A)
    np.testing.assert_allclose(written_out(W0, m, B, A), W0 + B @ A, atol=1e-14, rtol=0)


@pytest.mark.parametrize("heights", [(6,), (1, 5), (2, 2, 2), (0, 6)], ids=str)
def test_rows_may_come_in_pieces(heights: tuple[int, ...]) -> None:
    W0, m, B, A = problem(2)
    pieces = iter(W0.split(heights, dim=-2))
    torch.testing.assert_close(dora_scales(pieces, m, B, A), dora_scales(W0, m, B, A))


def test_a_large_weight_is_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_BLOCK_ELEMENTS", 20)  # two rows of nine
    W0, _, B, A = problem()
    assert [tuple(block.shape) for block in dora._blocks(W0)] == [(2, 9)] * 3
    norms = np.linalg.norm(W0.numpy() + B.numpy() @ A.numpy(), axis=-1)
    np.testing.assert_allclose(low_rank_row_norms(W0, B, A), norms, atol=1e-14)
    monkeypatch.setattr(dora, "_BLOCK_ELEMENTS", 1)
    assert [tuple(block.shape) for block in dora._blocks(W0)] == [(1, 9)] * 6


def test_squares_are_summed_in_double_precision() -> None:
    """A row of a million equal entries: summing in float32 would be off in the fifth digit."""
    W0 = torch.full((1, 1 << 20), 0.1)
    norms = low_rank_row_norms(W0, torch.zeros(1, 1), torch.zeros(1, 1 << 20))
    assert float(norms) == pytest.approx(1024 * float(W0[0, 0]), rel=1e-11)


def test_half_precision_is_lifted() -> None:
    W0, m, B, A = (x.bfloat16() for x in problem())
    D = dora_scales(W0, m, B, A)
    exact = written_out(*(x.double() for x in (W0, m, B, A)))
    made = D[:, None] * (W0.double() + B.double() @ A.double())
    np.testing.assert_allclose(made, exact, rtol=1e-6)
    assert dora_left_factor(D, B).dtype == torch.float32


def test_inputs_are_left_alone() -> None:
    given = problem()
    before = [x.clone() for x in given]
    W0, m, B, A = given
    dora_magnitudes(dora_scales(W0, m, B, A), W0, B, A)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_what_has_no_dora_is_refused() -> None:
    W0, m, B, A = problem()
    gone = W0.clone()
    gone[4] = -(B @ A)[4]
    with pytest.raises(NumericalError, match=r"all zero or not finite.*feature 4") as caught:
        dora_scales(gone, m, B, A)
    assert caught.value.remedy
    nan = W0.clone()
    nan[2, 3] = torch.nan
    with pytest.raises(NumericalError, match="feature 2"):
        dora_scales(nan, m, B, A)
    for value in (0.0, torch.inf, torch.nan):
        D = torch.ones(6)
        D[5] = value
        with pytest.raises(NumericalError, match=r"no DoRA adapter expresses.*feature 5"):
            dora_magnitudes(D, W0, B, A)


@pytest.mark.parametrize(
    "change",
    [
        lambda W0, m, B, A: (W0[:5], m, B, A),
        lambda W0, m, B, A: (torch.cat([W0, W0]), m, B, A),
        lambda W0, m, B, A: (W0[:, 1:], m, B, A),
        lambda W0, m, B, A: (W0, m[1:], B, A),
        lambda W0, m, B, A: (W0, m, B[:, 1:], A),
        lambda W0, m, B, A: (W0[0], m, B, A),
        lambda W0, m, B, A: ([W0[:5]], m, B, A),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change) -> None:
    with pytest.raises(AdapterError, match=r"do not fit|must be a matrix") as caught:
        dora_scales(*change(*problem()))
    assert caught.value.remedy
    with pytest.raises(AdapterError, match="not one scale per output feature"):
        dora_left_factor(torch.ones(5), problem()[2])
