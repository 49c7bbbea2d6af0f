"""The starting model kept three ways: each gives what the model gave before it was trained."""

from __future__ import annotations

import pytest
import torch
from objective_cases import (
    SETS,
    moved,
    selected,
    tiny_gpt2,
    tiny_llama,
    unlearning_batch,
    with_adapter,
)

from orthomerge.errors import AdapterError, RecipeError, UnknownNameError
from orthomerge.unlearning.objectives import (
    AdapterOff,
    CachedScores,
    FrozenCopy,
    Need,
    reference_for,
    sequence_losses,
)

BATCH = unlearning_batch()
FORGET = BATCH["forget"]


def outputs(model):
    model.eval()
    with torch.no_grad():
        found = model(
            input_ids=FORGET["input_ids"], attention_mask=FORGET["attention_mask"],
            output_hidden_states=True,
        )  # fmt: skip
    model.train()
    return found.logits, found.hidden_states


@pytest.mark.parametrize(
    ("make", "keep"),
    [
        (tiny_llama, FrozenCopy),
        (tiny_gpt2, FrozenCopy),
        (lambda: with_adapter(tiny_llama(), lora_dropout=0.5), AdapterOff),
        (lambda: with_adapter(tiny_llama(), "oft", module_dropout=0.5), AdapterOff),
        (lambda: moved(with_adapter(tiny_llama()), by=0.3), FrozenCopy),
    ],
    ids=["plain", "dropout", "lora", "oft", "continued-lora"],
)
def test_a_reference_stays_when_the_model_moves(make, keep) -> None:
    model = make()
    logits, states = outputs(model)
    reference = keep(model)
    moved(model, by=0.3)
    flags = [p.requires_grad for p in model.parameters()]
    for _ in range(2):
        torch.testing.assert_close(reference.logits(FORGET), logits)
        torch.testing.assert_close(reference.hidden(FORGET, 0), states[1])
        scores, _ = sequence_losses(logits, FORGET["labels"])
        torch.testing.assert_close(reference.scores(FORGET), scores)
    assert not reference.logits(FORGET).requires_grad
    assert not torch.allclose(outputs(model)[0], logits, atol=1e-2)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(module.training for module in model.modules())


def test_a_frozen_part_of_the_adapter_stays_frozen() -> None:
    model = with_adapter(tiny_llama())
    reference = AdapterOff(model)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    reference.logits(FORGET)
    trained = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_B"}


def test_a_copy_shares_what_is_frozen() -> None:
    model = with_adapter(tiny_llama())
    kept = FrozenCopy(model)._copy
    pairs = zip(model.named_parameters(), kept.parameters(), strict=True)
    assert all((p is q) == ("lora_" not in name) for (name, p), q in pairs)
    assert not any(p.requires_grad for p in kept.parameters())


def test_an_adapter_that_changes_the_model_cannot_be_switched_off() -> None:
    with pytest.raises(AdapterError, match="already changes it"):
        AdapterOff(moved(with_adapter(tiny_llama()), by=0.3))


def test_something_trained_beside_the_adapter_is_found() -> None:
    model = with_adapter(tiny_llama())
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="embed_tokens"):
        AdapterOff(model)


def test_cached_scores_follow_the_rows_through_any_order() -> None:
    model = tiny_llama()
    reference = CachedScores(model, SETS, batch_size=2)
    wanted = {part: FrozenCopy(model).scores(BATCH[part]) for part in SETS}
    moved(model)
    for cached in (reference, CachedScores.from_state_dict(reference.state_dict())):
        for part in SETS:
            for places in ([0, 1, 2], [2, 0], [1]):
                rows = selected(BATCH, places)[part]
                found = cached.scores(rows, part=part)
                torch.testing.assert_close(found, wanted[part][places])


def test_cached_scores_are_not_used_for_other_rows() -> None:
    cached = CachedScores(tiny_llama(), SETS)
    with pytest.raises(RecipeError, match="row 0"):
        cached.scores(BATCH["alternate"], part="forget")
    with pytest.raises(RecipeError, match="row 9"):
        cached.scores({**FORGET, "row": torch.tensor([0, 1, 9])})
    with pytest.raises(UnknownNameError):
        cached.scores(BATCH["retain"], part="retain")
    with pytest.raises(RecipeError, match="hidden states"):
        cached.hidden(FORGET, 0)


def test_the_cheapest_reference_is_chosen() -> None:
    scores, logits = {Need.REFERENCE_SCORES}, {Need.REFERENCE_SCORES, Need.REFERENCE_LOGITS}
    plain, fresh = tiny_llama(), with_adapter(tiny_llama())
    used = moved(with_adapter(tiny_llama()), by=0.3)
    assert reference_for(plain, {Need.HIDDEN}) is None
    assert isinstance(reference_for(fresh, scores, sets=SETS), AdapterOff)
    assert isinstance(reference_for(plain, scores, sets=SETS), CachedScores)
    assert isinstance(reference_for(used, scores, sets=SETS), CachedScores)
    assert isinstance(reference_for(plain, scores), FrozenCopy)
    assert isinstance(reference_for(used, logits, sets=SETS), FrozenCopy)
