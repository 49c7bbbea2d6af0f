"""The verdict on adapters whose relation is known: loud, shared, alike, opposed, untrained."""

from __future__ import annotations

import pytest
import torch

from orthomerge.diagnostics import compare_updates, compared, judge_updates
from orthomerge.diagnostics.updates import with_rank
from orthomerge.linalg.factors import Factors, concatenated


class Source:
    """Random factors of rank 4 from one seed."""

    def __init__(self, o: int = 300, n: int = 400, rank: int = 4) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.o, self.n, self.rank = o, n, rank

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def adapter(self, scale: float = 1.0) -> Factors:
        return Factors(scale * self.normal(self.o, self.rank), self.normal(self.rank, self.n))


def judged(*factors: Factors, rank: int | None = None):
    module = compare_updates("q", factors, merged=concatenated(factors))
    return judge_updates(
        compared([str(at) for at in range(len(factors))], [with_rank(module, rank)])
    )


def test_equally_loud_adapters_need_no_decoupling() -> None:
    source = Source()
    said = judged(source.adapter(), source.adapter(1.5))
    assert said.decoupling_matters is False
    assert "about equally loud (imbalance 1.49, MV of columns 0.11)" in said.text
    assert "will not matter" in said.text


@pytest.mark.parametrize(("scale", "matters"), [(1.8, False), (2.3, True), (40.0, True)])
def test_imbalance_decides_from_two_on(scale, matters) -> None:
    source = Source()
    said = judged(source.adapter(), source.adapter(scale))
    assert said.decoupling_matters is matters
    assert ("Adapter 2 is" in said.text) is matters
    assert ("whether the mean gains" in said.text) is matters


def test_a_loud_adapter_is_named_with_what_the_sum_makes_of_the_others() -> None:
    source = Source()
    said = judged(source.adapter(100), source.adapter(), source.adapter(2))
    assert "times as loud as adapter 2 and holds over 99.9% of the energy" in said.text
    assert "cosine 1.00 with it and 0.0" in said.text
    assert "from the loud tasks to the quiet ones" in said.text


def test_columns_alone_can_make_decoupling_matter() -> None:
    source = Source()
    one, two = source.adapter(), source.adapter()
    halves = torch.ones(source.n, dtype=torch.float64)
    halves[: source.n // 2] = 0.05
    said = judged(Factors(one.B, one.A * halves), Factors(two.B, two.A * halves.flip(0)))
    assert said.decoupling_matters is True
    assert "but not column by column" in said.text


def test_adapters_that_use_different_directions_are_orthogonal_already() -> None:
    source = Source(o=40, n=40)
    Q, _ = torch.linalg.qr(source.normal(40, 8))
    P, _ = torch.linalg.qr(source.normal(40, 8))
    said = judged(Factors(Q[:, :4], P[:, :4].mT), Factors(Q[:, 4:], P[:, 4:].mT))
    assert said.orthogonalising_matters is False
    assert "orthogonalising is a no-op" in said.text


def test_overlap_as_of_unrelated_adapters_is_called_that() -> None:
    source = Source(o=40, n=40)
    said = judged(source.adapter(), source.adapter())
    assert said.orthogonalising_matters is True
    assert "as unrelated adapters of such ranks do" in said.text


def test_a_quiet_adapter_inside_a_loud_one_is_not_called_free_of_overlap() -> None:
    source = Source()
    loud = source.adapter(1000)
    said = judged(loud, Factors(source.normal(source.o, 4), loud.A))
    assert said.orthogonalising_matters is True


@pytest.mark.parametrize("side", ["A", "B"])
def test_one_initialisation_shows_in_the_frames(side) -> None:
    source = Source()
    first = source.adapter()
    near = Factors(source.normal(source.o, 4), first.A + 0.05 * source.normal(4, source.n))
    if side == "B":
        near = Factors(first.B + 0.05 * source.normal(source.o, 4), source.normal(4, source.n))
    said = judged(first, near)
    assert said.shared == side
    assert f"All share one {side} frame" in said.text
    assert ("one initialisation" in said.text) is (side == "A")
    assert f"acts on {'B' if side == 'A' else 'A'} only" in said.text


def test_copies_share_both_frames_and_count_twice() -> None:
    source = Source()
    first = source.adapter()
    said = judged(first, first)
    assert said.shared == "both"
    assert "acts on both sides" in said.text
    assert "nearly the same update (cosine 1.00): a plain sum counts it twice" in said.text


def test_related_frames_are_mentioned() -> None:
    source = Source()
    first = source.adapter()
    said = judged(first, Factors(source.normal(300, 4), first.A + source.normal(4, source.n)))
    assert said.shared is None
    assert "Their A frames are related" in said.text


def test_opposed_adapters_are_named() -> None:
    source = Source()
    first, other = source.adapter(), source.adapter(0.5)
    said = judged(first, other, concatenated([first, other], [-1.0, 1.0]))
    assert "Adapters 1 and 3 oppose each other (cosine -0.9" in said.text


def test_untrained_adapters_are_named_and_do_not_count() -> None:
    source = Source()
    nothing = Factors(torch.zeros(source.o, 4).double(), source.normal(4, source.n))
    said = judged(source.adapter(), nothing, source.adapter())
    assert said.unchanged == (2,)
    assert said.decoupling_matters is False
    assert "Adapter 2 changes nothing (untrained?)." in said.text
    alone = judged(source.adapter(), nothing)
    assert (alone.decoupling_matters, alone.orthogonalising_matters) == (None, None)
    assert "nothing can interfere" in alone.text


def test_a_rank_that_loses_much_is_named() -> None:
    source = Source()
    parts = [source.adapter(), source.adapter()]
    assert "The rank asked for keeps" in judged(*parts, rank=3).text
    assert "in q: a higher --rank" in judged(*parts, rank=3).text
    assert "rank" not in judged(*parts, rank=8).text.replace("such ranks", "")
