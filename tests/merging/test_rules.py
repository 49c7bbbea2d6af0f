"""Values that vary from tensor to tensor."""

from __future__ import annotations

import pytest

from orthomerge.merging.rules import LayerMap, check_value, unmatched_rules, value_for
from orthomerge.parameters import Between, Parameter

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]
LAYERS = LayerMap.of(NAMES)
DENSITY = Parameter("density", float, 0.2, bounds=Between(0, 1, open_low=True))


def test_layers_lie_between_embedding_and_head() -> None:
    assert [LAYERS.positions[name] for name in NAMES] == [0.0, 0.0, 0.5, 1.0, 1.0, 1.0]


def test_stacks_have_their_own_depth() -> None:
    names = ["encoder.layer.3.w", "decoder.block.0.w", "decoder.block.1.w", "encoder.layer.0.w"]
    positions = LayerMap.of(names).positions
    assert [positions[name] for name in names] == [1.0, 0.0, 1.0, 0.0]


def test_scalar_applies_everywhere() -> None:
    assert {value_for(0.3, name, LAYERS, 0.2) for name in NAMES} == {0.3}


def test_gradient_is_interpolated_over_the_layers() -> None:
    values = [value_for([0.0, 1.0, 0.5], name, LAYERS, 0.2) for name in NAMES[1:4]]
    assert values == [0.0, 1.0, 0.5]
    assert value_for([0.2, 0.4], NAMES[2], LAYERS, 0.2) == pytest.approx(0.3)
    assert value_for([0.7], NAMES[2], LAYERS, 0.2) == 0.7


def test_first_matching_rule_wins_and_the_last_is_the_default() -> None:
    rules = [
        {"match": "*.mlp.*", "value": [0.1, 0.9]},
        {"match": "*layers*", "value": 0.5},
        {"value": 0.4},
    ]
    found = [value_for(rules, name, LAYERS, 0.2) for name in NAMES]
    assert found == [0.4, 0.5, 0.5, 0.9, 0.4, 0.4]


def test_without_a_matching_rule_the_default_applies() -> None:
    assert value_for([{"match": "*.mlp.*", "value": 0.1}], NAMES[0], LAYERS, 0.2) == 0.2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.5, "density"),
        ([0.2, "x"], "density"),
        ([], "empty"),
        ({"match": "*", "value": 1}, "scalar, a gradient or a list of rules"),
        ([{"match": "*"}], "keys match and value"),
        ([{"value": 0.1}, {"match": "*", "value": 0.1}], "keys match and value"),
        ([{"match": 3, "value": 0.1}], "glob"),
        ([{"match": "*", "value": 2.0}], "density"),
        ([{"match": "*", "value": 0.1, "extra": 1}], "keys match and value"),
        ([{"match": "*", "value": [{"value": 0.1}]}], "not rules"),
    ],
)
def test_wrong_values_are_named(value, words) -> None:
    problems = check_value(value, DENSITY.check, "parameter 'density'")
    assert len(problems) == 1
    assert words in str(problems[0])


def test_all_wrong_values_are_reported() -> None:
    rules = [{"match": "a", "value": 2.0}, {"match": "b", "value": -1.0}, {"value": 0.5}]
    assert len(check_value(rules, DENSITY.check, "density")) == 2


def test_globs_that_match_nothing_are_found() -> None:
    rules = [{"match": "*.mlp.*", "value": 1}, {"match": "*.mpl.*", "value": 1}, {"value": 2}]
    assert unmatched_rules(rules, NAMES) == ["*.mpl.*"]
    assert unmatched_rules(0.5, NAMES) == []
