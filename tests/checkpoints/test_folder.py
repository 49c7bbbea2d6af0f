"""Files around the weights: config dtype, inherited files, tied output heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orthomerge.checkpoints.folder import (
    config_with_dtype,
    inherited_files,
    is_tied,
    read_config,
    tied_alias,
)
from orthomerge.errors import CheckpointError


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": None}, {"torch_dtype": "bfloat16"}),
        ({"dtype": None}, {"dtype": "bfloat16"}),
        ({}, {"dtype": "bfloat16"}),
        (
            {"torch_dtype": "float32", "text_config": {"torch_dtype": "float32", "n": 1}},
            {"torch_dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "n": 1}},
        ),
        (
            {"vision_config": {"deep": {"dtype": "float32"}}},
            {"vision_config": {"deep": {"dtype": "bfloat16"}}, "dtype": "bfloat16"},
        ),
        ({"dtype": "float32", "x": [1, {"dtype_of_x": "float32"}]}, None),
    ],
)
def test_config_says_the_output_dtype(config: dict[str, Any], expected: dict[str, Any]) -> None:
    text = config_with_dtype(config, "bfloat16")
    assert json.loads(text) == (expected or {**config, "dtype": "bfloat16"})
    assert text.endswith("}\n")


def test_config_keeps_order_and_other_entries() -> None:
    config = {"z": 1, "dtype": "float32", "ä": [None, 1.5, "dtype"], "a": {"dtype": None}}
    before = json.dumps(config)
    assert list(json.loads(config_with_dtype(config, "float16"))) == ["z", "dtype", "ä", "a"]
    assert '"ä"' in config_with_dtype(config, "float16")
    assert json.loads(config_with_dtype(config, "float16"))["a"] == {"dtype": None}
    assert json.dumps(config) == before


def test_missing_config_is_none(tmp_path: Path) -> None:
    assert read_config(None) is None
    assert read_config(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "1", "{", "[" * 100_000])
def test_malformed_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert caught.value.file == str(tmp_path / "config.json")


def test_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)


def test_output_inherits_tokenizer_and_code_but_no_weights(tmp_path: Path) -> None:
    taken = {
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "modeling_own.py",
        "LICENSE",
    }
    left = {
        "config.json",
        "README.md",
        "orthomerge.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "setup.py",
    }
    for name in taken | left:
        (tmp_path / name).write_text("x")
    (tmp_path / "tokenizer").mkdir()
    assert set(inherited_files(tmp_path)) == taken


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (None, False),
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_config_tells_whether_the_head_is_tied(config: dict[str, Any] | None, tied: bool) -> None:
    assert is_tied(config) is tied


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (
            ["model.embed_tokens.weight", "lm_head.weight"],
            ("lm_head.weight", "model.embed_tokens.weight"),
        ),
        (["model.embed_tokens.weight"], ("lm_head.weight", "model.embed_tokens.weight")),
        (["transformer.wte.weight"], ("lm_head.weight", "transformer.wte.weight")),
        (
            ["gpt_neox.embed_in.weight", "embed_out.weight"],
            ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ),
        (
            ["tok_embeddings.weight", "output.weight", "layers.0.attention.output.weight"],
            ("output.weight", "tok_embeddings.weight"),
        ),
        (
            ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
            ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ),
        (["shared.weight", "encoder.embed_tokens.weight"], None),
        (["embed_tokens.weight", "lm_head.weight", "text.lm_head.weight"], None),
        (["layers.0.weight"], None),
        ([], None),
    ],
)
def test_tied_pair_is_found_or_left_alone(names: list[str], pair: tuple[str, str] | None) -> None:
    assert tied_alias(names) == pair
    assert tied_alias(reversed(names)) == pair
