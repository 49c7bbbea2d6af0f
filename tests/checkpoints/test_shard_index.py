"""Shard indexes that disagree with their shards, or that want to lead somewhere else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.errors import HeaderError, OrthoMergeError, ProblemsError, ShardIndexError

StateDict = dict[str, torch.Tensor]
Writer = Callable[..., Path]
INDEX_NAME = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(write_folder: Writer) -> Path:
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("abcd")}
    return write_folder("m", tensors, shards=2)  # a, c in the first; b, d in the second


def set_map(folder: Path, **changes: str | None) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    merged = index["weight_map"] | changes
    index["weight_map"] = {name: shard for name, shard in merged.items() if shard is not None}
    path.write_text(json.dumps(index))


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(ShardIndexError, match=f"the shard {SECOND} is missing") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / INDEX_NAME)


def test_all_problems_of_shards_are_listed(folder: Path) -> None:
    (folder / FIRST).write_bytes(b"")
    (folder / SECOND).unlink()
    with pytest.raises(ProblemsError) as caught:
        open_checkpoint(folder)
    assert [type(problem) for problem in caught.value.problems] == [HeaderError, ShardIndexError]
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "target",
    [
        "../m/" + SECOND,
        "sub/../../m/" + SECOND,
        "{folder}/" + SECOND,
        "/{folder}/" + SECOND,
        "..\\m\\" + SECOND,
        "..",
        ".",
        "",
    ],
)
def test_index_that_points_outside_is_refused(target: str, folder: Path) -> None:
    set_map(folder, d=target.format(folder=folder))
    with pytest.raises(ShardIndexError, match="outside its folder") as caught:
        open_checkpoint(folder)
    assert caught.value.tensor == "d"


@pytest.mark.parametrize("target", ["x" * 300 + ".safetensors", "a\0b.safetensors"])
def test_impossible_shard_name_is_missing(target: str, folder: Path) -> None:
    set_map(folder, d=target)
    with pytest.raises(ShardIndexError, match="is missing"):
        open_checkpoint(folder)


def test_shard_in_a_subfolder_opens(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / SECOND).rename(folder / "sub" / SECOND)
    set_map(folder, b=f"sub/{SECOND}", d=f"./sub//{SECOND}")
    assert set(open_checkpoint(folder).tensors) == set("abcd")


def test_tensor_in_two_shards_is_refused(folder: Path, write_file: Writer) -> None:
    write_file(f"m/{SECOND}", {name: torch.zeros(2) for name in "abd"})
    with pytest.raises(ShardIndexError, match=f"is in {SECOND}, the index says {FIRST}") as caught:
        open_checkpoint(folder)
    assert caught.value.tensor == "a"


def test_tensor_only_in_the_index_is_refused(folder: Path) -> None:
    set_map(folder, ghost=FIRST)
    with pytest.raises(ShardIndexError, match="'ghost': is in the index but in no shard"):
        open_checkpoint(folder)


def test_tensor_only_in_a_shard_is_refused(folder: Path) -> None:
    set_map(folder, d=None)
    with pytest.raises(ShardIndexError, match=f"'d': is in {SECOND} but not in the index"):
        open_checkpoint(folder)


def test_tensor_in_another_shard_than_said_is_refused(folder: Path) -> None:
    set_map(folder, d=FIRST, c=SECOND)
    with pytest.raises(ProblemsError) as caught:
        open_checkpoint(folder)
    assert {problem.tensor for problem in caught.value.problems} == {"c", "d"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nonsense",
        '"weight_map"',
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {}}',
        '{"weight_map": ' + '{"a":' * 100_000,
    ],
)
def test_malformed_index_is_refused(text: str, folder: Path) -> None:
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(ShardIndexError) as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / INDEX_NAME)


def test_index_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / INDEX_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ShardIndexError, match="is not a shard index"):
        open_checkpoint(folder)


def test_folder_named_like_an_index_is_refused(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / INDEX_NAME).mkdir()
    with pytest.raises(ShardIndexError, match="cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("level", ["tensor", "top"])
def test_duplicate_key_is_refused(level: str, folder: Path) -> None:
    body = f'{{"a": "{FIRST}", "a": "{SECOND}"}}'
    twice = f'"weight_map": {body}' if level == "tensor" else '"weight_map": {}, "weight_map": {}'
    (folder / INDEX_NAME).write_text(f"{{{twice}}}")
    with pytest.raises(ShardIndexError, match="names this key twice") as caught:
        open_checkpoint(folder)
    assert caught.value.tensor == ("a" if level == "tensor" else "weight_map")


def test_many_duplicate_keys_are_refused_at_once(folder: Path) -> None:
    pairs = ", ".join(f'"t{i // 2}": "{FIRST}"' for i in range(60_000))
    (folder / INDEX_NAME).write_text(f'{{"weight_map": {{{pairs}}}}}')
    started = time.monotonic()
    with pytest.raises(OrthoMergeError, match="twice"):
        open_checkpoint(folder)
    assert time.monotonic() - started < 5
