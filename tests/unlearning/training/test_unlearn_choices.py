"""Every objective, adapter and option takes its steps, with and without projection."""

from __future__ import annotations

import pytest
from unlearn_runs import request, run

from orthomerge.unlearning.objectives import all_objectives

NEEDED = {"pdu": {"parameters": {"tolerance": 0.05}}}
SHORT = {"train__max_steps": 2, "stop__max_retain_rise": None, "train__save_every": 50}


def taken(facts, tmp_path, **changes):
    """Run two steps; return the table and the steps."""
    steps = []
    result = run(request(facts, tmp_path / "out", **{**SHORT, **changes}), report=steps.append)
    assert [step.step for step in steps] == [1, 2]
    forget = result.table[0]
    assert forget.loss_after != forget.loss_before
    return result, steps


@pytest.mark.parametrize("name", sorted(all_objectives()))
@pytest.mark.parametrize("projection", ["gu", "off"])
def test_every_objective(name, projection, facts, tmp_path):
    _, steps = taken(facts, tmp_path, objective=name, projection=projection, **NEEDED.get(name, {}))
    assert (steps[0].projection is None) == (projection == "off")
    if projection == "gu":
        assert steps[1].projection["residual_after"] <= 1e-5
    hidden = name in ("dpo", "idk")  # their forget loss is one of the refusals
    assert hidden or steps[1].forget_loss <= steps[0].forget_loss + 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__retain_loss": "kl"},
        {"loss__retain_loss": "kl", "adapter__kind": "full", "train__learning_rate": 5e-4},
        {"adapter__kind": "oft", "adapter__block_size": 8, "train__learning_rate": 1e-2},
        {
            "adapter__kind": "full",
            "train__learning_rate": 5e-4,
            "train__gradient_checkpointing": True,
        },
        {"train__gradient_checkpointing": True},
        {"objective": "rmu", "train__gradient_checkpointing": True},
        {"train__optimizer": "sgd", "train__learning_rate": 1.0},
        {"train__batch_size": 2, "train__accumulation": 2, "data__retain_per_forget": 3},
        {"train__precision": "bf16"},
        {"projection": "gu-cheap"},
        {"projection": {"granularity": "global", "delta_metric": "adam", "metric": "adam"}},
        {"projection": {"row_dtype": "bfloat16", "bank_rows": 5, "bank_size": 2}},
        {"projection": {"stage": "B", "scope": "q_proj"}},
        {"projection": {"stage": "A", "mode": "cone", "allow_approximate": True}},
        {"projection": "pcgrad", "train__optimizer": "sgd", "train__learning_rate": 1.0},
        {"train__warmup_steps": 1, "train__weight_decay": 0.1, "train__max_grad_norm": 0},
        {"holdout": None, "stop__level": "auto"},
        {"loss__retain_weight": 0.0},
        {"retain": None, "projection": "off", "loss__retain_weight": 0.0},
        {"adapter__targets": ["q_proj", "v_proj"], "adapter__rank": 2},
    ],
    ids=lambda changes: "-".join(str(v) for v in changes.values())[:40],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:stage A with momentum:UserWarning")
@pytest.mark.filterwarnings("ignore:.*outside the scope:UserWarning")
def test_every_option(changes, facts, tmp_path):
    taken(facts, tmp_path, **changes)


def test_checkpointing_and_accumulation_change_nothing_that_matters(facts, tmp_path):
    found = []
    for number, changes in enumerate(
        [{}, {"train__gradient_checkpointing": True},
         {"train__batch_size": 2, "train__accumulation": 3}]
    ):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        result, _ = taken(facts, folder, **changes)
        found.append([row.loss_after for row in result.table])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)
