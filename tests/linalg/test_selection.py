"""The k-th largest magnitude, against a full sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.errors import NumericalError
from orthomerge.linalg import selection
from orthomerge.linalg.selection import kth_largest_magnitude, kth_largest_magnitudes


class Chunks:
    """A tensor in pieces, with a sample that may mislead."""

    def __init__(self, values: torch.Tensor, size: int = 1000, misleading: bool = False) -> None:
        self.values, self.size, self.misleading = values, size, misleading
        self.numel = values.numel()
        self.passes = 0

    def chunks(self):
        self.passes += 1
        yield from self.values.split(self.size)

    def sample(self, count: int) -> torch.Tensor:
        if self.misleading:
            return self.values.abs().sort().values[: max(1, self.numel // 50)]
        return self.values[:: max(1, self.numel // count)]


def by_sorting(values: torch.Tensor, k: int) -> float:
    return values.abs().sort(descending=True).values[k - 1].item()


@pytest.mark.parametrize("k", [1, 2, 500, 9_999, 50_000, 99_999, 100_000])
@pytest.mark.parametrize("misleading", [False, True])
def test_equals_sorting(k, misleading) -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert kth_largest_magnitude(Chunks(values, misleading=misleading), k) == by_sorting(values, k)


def test_one_pass_and_few_candidates_when_the_sample_is_good(monkeypatch) -> None:
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    collected = []
    original = selection._count_and_collect

    def spy(*arguments):
        found = original(*arguments)
        collected.extend(len(inside) for _, inside in found)
        return found

    monkeypatch.setattr(selection, "_count_and_collect", spy)
    chunks = Chunks(values)
    kth_largest_magnitude(chunks, 60_000)
    assert chunks.passes == 1
    assert collected[0] < 0.05 * values.numel()


def test_several_are_walked_through_in_step() -> None:
    generator = torch.Generator().manual_seed(2)
    sets = [torch.randn(5_000, generator=generator) * 10**i for i in range(3)]
    walked: list[int] = []

    class Recording(Chunks):
        def chunks(self):
            for chunk in super().chunks():
                walked.append(id(self))
                yield chunk

    streams = [Recording(sets[0]), Recording(sets[1], misleading=True), Recording(sets[2])]
    ks = [1, 2_500, 4_999]
    wanted = [by_sorting(values, k) for values, k in zip(sets, ks, strict=True)]
    assert kth_largest_magnitudes(streams, ks) == wanted
    assert walked[:15] == [id(stream) for stream in streams] * 5
    assert [stream.passes for stream in streams] == [1, 2, 1]  # the misled one looks again


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-40, 3e38]), min_size=1),
    st.data(),
)
def test_equals_sorting_with_many_equal_values(numbers, data) -> None:
    values = torch.tensor(numbers)
    k = data.draw(st.integers(1, len(numbers)))
    assert kth_largest_magnitude(Chunks(values, 3), k) == by_sorting(values, k)


@pytest.mark.parametrize("k", [0, 6])
def test_rank_outside_the_range_is_refused(k) -> None:
    with pytest.raises(ValueError, match="not between"):
        kth_largest_magnitude(Chunks(torch.ones(5)), k)


def test_not_a_number_does_not_loop() -> None:
    with pytest.raises(NumericalError):
        kth_largest_magnitude(Chunks(torch.full((5,), float("nan"))), 2)
