"""From adapter tensor names to the base model's."""

from __future__ import annotations

import pytest

from orthomerge.adapters import base_tensor_name, base_weight_name, oft_key, strip_prefix
from orthomerge.errors import AdapterError

BASE = {
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.attention.query.weight",
    "bert.encoder.layer.0.attention.query.bias",
    "bert.encoder.layer.1.attention.query.weight",
    "classifier.weight",
    "weight",
}


def test_the_same_name_comes_first() -> None:
    names = {"query.weight", "bert.query.weight"}
    assert base_weight_name("query", names) == "query.weight"


def test_the_base_may_have_a_longer_prefix() -> None:
    module = "encoder.layer.1.attention.query"
    assert base_weight_name(module, BASE) == f"bert.{module}.weight"


def test_the_adapter_may_have_a_longer_prefix() -> None:
    assert base_weight_name("model.classifier", BASE) == "classifier.weight"
    assert base_tensor_name("x.y.classifier.weight", BASE) == "classifier.weight"


def test_a_bare_parameter_is_no_match() -> None:
    with pytest.raises(AdapterError, match="not in the base model"):
        base_weight_name("pooler", {"weight", "query.weight"})


def test_a_suffix_that_is_no_whole_part_is_no_match() -> None:
    with pytest.raises(AdapterError, match="not in the base model"):
        base_weight_name("fier", BASE)


def test_several_matches_are_refused_and_listed() -> None:
    with pytest.raises(AdapterError, match=r"several.*layer\.0.*layer\.1") as caught:
        base_weight_name("attention.query", BASE)
    assert caught.value.tensor == "attention.query.weight"


def test_near_names_are_offered() -> None:
    with pytest.raises(AdapterError, match=r"layer\.0\.attention\.query") as caught:
        base_weight_name("bert.encoder.layer.7.attention.query", BASE)
    assert caught.value.tensor == "bert.encoder.layer.7.attention.query.weight"


def test_prefix() -> None:
    assert strip_prefix(oft_key("a.b", "linear")) == "a.b.oft_R.weight"
    assert strip_prefix(oft_key("e", "embedding")) == "e.oft_embedding_R.weight"
    with pytest.raises(AdapterError, match=r"does not start with 'base_model\.model\.'") as caught:
        strip_prefix("a.oft_R.weight", file="adapter")
    assert (caught.value.file, caught.value.tensor) == ("adapter", "a.oft_R.weight")
