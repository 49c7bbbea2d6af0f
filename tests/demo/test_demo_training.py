"""The small model: which layers adapters turn, what stays frozen, and that seeds decide."""

from __future__ import annotations

import pytest
import torch

from orthomerge.demo.data import load_digits
from orthomerge.demo.settings import QUICK_DEMO, TrainSettings
from orthomerge.demo.training import (
    HEAD,
    add_oft,
    build_model,
    freeze_head,
    target_names,
    train,
)

pytestmark = pytest.mark.slow  # the first import of transformers alone takes seconds

_SHORT = TrainSettings(steps=3, learning_rate=1e-3, batch_size=8)


def _trained(seed: int) -> dict[str, torch.Tensor]:
    model = build_model(QUICK_DEMO, seed=seed)
    freeze_head(model)
    train(model, load_digits(0).train, _SHORT, seed=seed)
    return dict(model.state_dict())


def test_training_is_decided_by_the_seed() -> None:
    first, again, other = _trained(0), _trained(0), _trained(1)
    assert all(first[name].equal(again[name]) for name in first)
    assert any(not first[name].equal(other[name]) for name in first)


def test_a_frozen_head_stays_while_the_rest_moves() -> None:
    before = build_model(QUICK_DEMO, seed=0).state_dict()
    after = _trained(0)
    same = {name for name in before if before[name].equal(after[name])}
    assert same == {f"{HEAD}.weight", f"{HEAD}.bias"}


def test_an_adapter_turns_the_linear_layers_and_not_the_head() -> None:
    model = build_model(QUICK_DEMO, seed=0)
    targets = target_names(model)
    assert HEAD not in targets
    adapted = add_oft(model, block_size=QUICK_DEMO.oft_block_size, base_name="base")
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert len(trained) == 6 * QUICK_DEMO.layers  # query, key, value, output, two of the MLP
    assert all("oft_R" in name for name in trained)
    assert {name.split(".oft_R")[0].rpartition(".")[2] for name in trained} == set(targets)
