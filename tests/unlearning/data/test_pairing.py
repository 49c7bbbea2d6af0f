"""Forget rows with retain rows: even use of the retain set, without state; and collation."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import bpe_tokenizer
from torch.utils.data import DataLoader

from orthomerge.errors import DataError, RecipeError
from orthomerge.unlearning.data import (
    IGNORED,
    PairedRows,
    Row,
    TokenisedSet,
    collate,
    collate_rows,
    padding_id,
    tokenise,
)
from orthomerge.unlearning.data.encoding import Encoded


def a_set(size: int, name: str = "rows", weight: float = 1.0) -> TokenisedSet:
    """Return a set whose example i is i + 1 tokens 10 i, all scored but the first."""
    examples = [Encoded([10 * i] * (i + 2), [IGNORED] + [10 * i] * (i + 1)) for i in range(size)]
    rows = [Row("text", text="x", weight=weight) for _ in range(size)]
    return TokenisedSet(name, tuple(rows), tuple(examples), (), ("x",) * size)


def stream(pairs: PairedRows, epochs: int) -> list[int]:
    """Return the retain rows in the order in which items use them."""
    used = []
    for epoch in range(epochs):
        pairs.set_epoch(epoch)
        for index in range(len(pairs)):
            used += [item["row"] for item in pairs[index]["retain"]]
    return used


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=80)
def test_every_retain_row_is_used_before_any_is_used_again(forget, retain, k, seed) -> None:
    pairs = PairedRows(a_set(forget), a_set(retain), seed=seed, retain_per_forget=k)
    used = stream(pairs, epochs=5)
    assert len(used) == 5 * forget * k
    for start in range(0, len(used), retain):
        one_pass = used[start : start + retain]
        assert len(set(one_pass)) == len(one_pass)
    counts = Counter(used)
    assert max(counts.values()) - min(counts[row] for row in range(retain)) <= 1


@given(st.data())
@settings(max_examples=40)
def test_an_item_depends_on_epoch_and_index_alone(data) -> None:
    forget, retain, k = (data.draw(st.integers(1, high)) for high in (7, 12, 3))
    pairs = PairedRows(a_set(forget), a_set(retain), seed=1, retain_per_forget=k)
    in_order = stream(pairs, epochs=6)
    again = PairedRows(a_set(forget), a_set(retain), seed=1, retain_per_forget=k)
    visits = data.draw(st.permutations([(e, i) for e in range(6) for i in range(forget)]))
    for epoch, index in visits:
        again.set_epoch(epoch)
        start = (epoch * forget + index) * k
        assert again.retain_rows(index) == in_order[start : start + k]


def test_passes_differ_and_so_do_seeds() -> None:
    used = stream(PairedRows(a_set(50), a_set(50), seed=0), epochs=6)
    passes = [tuple(used[i : i + 50]) for i in range(0, 300, 50)]
    assert len(set(passes)) == 6
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert stream(PairedRows(a_set(50), a_set(50), seed=1), epochs=1) != used[:50]
    # Consecutive passes are unrelated: a row keeps its place about once in fifty.
    kept = sum(a == b for one, two in pairwise(passes) for a, b in zip(one, two, strict=True))
    assert kept < 20


def test_the_stream_is_the_same_on_every_machine() -> None:
    assert stream(PairedRows(a_set(8), a_set(8), seed=0), epochs=1) == [3, 5, 7, 1, 2, 0, 4, 6]


def test_permutations_of_other_epochs_are_not_kept() -> None:
    pairs = PairedRows(a_set(10), a_set(3), seed=0)
    stream(pairs, epochs=40)
    assert len(pairs._passes) <= 5


class _Numbers(torch.utils.data.Dataset):
    """What a worker sees of the pairs, small enough to compare."""

    def __init__(self, pairs: PairedRows) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> list[int]:
        return self.pairs.retain_rows(index)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_same_stream_and_the_epoch(persistent) -> None:
    pairs = PairedRows(a_set(6), a_set(4), seed=2, retain_per_forget=2)
    expected = stream(pairs, epochs=3)
    pairs.set_epoch(0)
    loader = DataLoader(
        _Numbers(pairs),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=2,
        persistent_workers=persistent,
    )
    found = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        found += [row for rows in loader for row in rows]
    assert found == expected


def test_pairs_survive_pickling() -> None:
    pairs = PairedRows(a_set(6), a_set(4), seed=2, alternate=a_set(6))
    pairs.set_epoch(2)
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.epoch == 2
    assert [copy[i] for i in range(6)] == [pairs[i] for i in range(6)]


def test_retain_and_alternate_are_optional() -> None:
    assert set(PairedRows(a_set(2), None, seed=0)[1]) == {"forget"}
    pairs = PairedRows(a_set(2), None, seed=0, alternate=a_set(2))
    assert pairs[1]["alternate"]["row"] == pairs[1]["forget"]["row"] == 1
    assert pairs[-1] == pairs[1]
    with pytest.raises(IndexError):
        pairs[2]


def test_sets_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(DataError, match="the retain set is empty"):
        PairedRows(a_set(2), a_set(0, "retain"), seed=0)
    with pytest.raises(DataError, match="the forget set is empty"):
        PairedRows(a_set(0, "forget"), None, seed=0)
    with pytest.raises(DataError, match="expected 2, found 3"):
        PairedRows(a_set(2), None, seed=0, alternate=a_set(3))
    with pytest.raises(RecipeError, match="found 0"):
        PairedRows(a_set(2), a_set(2), seed=0, retain_per_forget=0)


# ------------------------------------------------------------------ collation


def test_batches_are_padded_on_the_right_and_masked() -> None:
    pairs = PairedRows(a_set(3), a_set(4), seed=0, alternate=a_set(3), retain_per_forget=2)
    batch = collate(7)([pairs[i] for i in range(3)])
    assert set(batch) == {"forget", "retain", "alternate"}
    forget = batch["forget"]
    expected = {
        "input_ids": [[0, 0, 7, 7], [10, 10, 10, 7], [20, 20, 20, 20]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[-100, 0, -100, -100], [-100, 10, 10, -100], [-100, 20, 20, 20]],
        "row": [0, 1, 2],
    }
    assert {key: tensor.tolist() for key, tensor in forget.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in forget.values())
    retained = [row for i in range(3) for row in pairs.retain_rows(i)]
    assert batch["retain"]["row"].tolist() == retained
    assert batch["retain"]["input_ids"].shape[0] == 6
    assert batch["alternate"]["row"].tolist() == [0, 1, 2]


def test_one_set_makes_token_batches() -> None:
    loader = DataLoader(a_set(5), batch_size=2, collate_fn=collate_rows(0))  # type: ignore[arg-type]
    batches = list(loader)
    assert [batch["row"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [batch["labels"].shape for batch in batches] == [(2, 3), (2, 5), (1, 6)]


def test_sets_that_are_absent_are_absent_from_batches() -> None:
    assert set(collate(0)([PairedRows(a_set(1), None, seed=0)[0]])) == {"forget"}


def test_weights_are_there_if_any_row_has_one() -> None:
    weighted = collate_rows(0)([a_set(2, weight=0.5)[i] for i in range(2)])
    assert weighted["weight"].tolist() == [0.5, 0.5]
    assert weighted["weight"].dtype == torch.float32
    assert "weight" not in collate_rows(0)([a_set(2)[0]])


def test_collation_can_be_given_to_workers() -> None:
    items = list(islice((a_set(3)[i] for i in range(3)), 2))
    copy = pickle.loads(pickle.dumps(collate_rows(3)))
    assert copy(items)["input_ids"].tolist() == collate_rows(3)(items)["input_ids"].tolist()


@pytest.mark.parametrize("token", [None, -1, "0", True])
def test_padding_must_be_a_token(token) -> None:
    with pytest.raises(RecipeError, match="padding_id"):
        collate(token)


def test_a_tokenizer_without_padding_token_pads_with_eos() -> None:
    tokenizer = bpe_tokenizer()
    assert tokenizer.pad_token is None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.pad_token = "<|im_start|>"
    assert padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(DataError, match="pad"):
        padding_id(object())


def test_labels_of_a_batch_are_what_a_model_scores() -> None:
    """The loss of a padded batch is that of its rows alone."""
    tokenizer = bpe_tokenizer()
    rows = [
        Row("qa", prompt="Who?", answer="Mira."),
        Row("qa", prompt="Which instrument does he play?", answer="The cello, every evening."),
    ]
    set_ = tokenise(rows, tokenizer, max_length=64)
    batch = collate_rows(padding_id(tokenizer))([set_[0], set_[1]])
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(len(tokenizer), len(tokenizer), generator=generator, dtype=torch.float64)

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = table[ids[:, :-1]]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )

    alone = 0.0
    for row in rows:
        whole = f"Question: {row.prompt}\nAnswer: {row.answer}"
        ids = [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
        start = len(tokenizer(whole[: whole.index("Answer:") + 7])["input_ids"])
        for place in range(start, len(ids)):
            alone -= table[ids[place - 1]].log_softmax(-1)[ids[place]].item()
    assert loss(batch["input_ids"], batch["labels"]).item() == pytest.approx(alone, rel=1e-12)
