"""Content digests: what they depend on, and that a merge records the same ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from orthomerge import merge
from orthomerge.checkpoints.digest import (
    DIGEST_PLACEHOLDER,
    HashingSource,
    content_digest,
    hash_checkpoint,
    hash_tensor,
)
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.sources import CheckpointSource, open_checkpoint

StateDict = dict[str, torch.Tensor]
Writer = Callable[..., Path]


def digest(source: CheckpointSource) -> str:
    checkpoint = open_checkpoint(source)
    try:
        return hash_checkpoint(checkpoint)
    finally:
        checkpoint.close()


def test_digest_is_the_documented_hash() -> None:
    tensors = {"ä": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(True)}
    hashes = {
        name: blake3(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()
    }
    lines = f'"a"\0BOOL\0\0{hashes["a"]}\n"\\u00e4"\0F32\x001x2\0{hashes["ä"]}\n'
    assert digest(tensors) == "blake3:" + blake3(lines.encode()).hexdigest()
    assert len(digest(tensors)) == len(DIGEST_PLACEHOLDER)


def test_digest_does_not_depend_on_files(
    write_file: Writer, write_folder: Writer, state_dict: StateDict, tmp_path: Path
) -> None:
    backwards = dict(reversed(state_dict.items()))
    torch.save(state_dict, tmp_path / "model.bin")
    sources = [
        state_dict,
        backwards,
        write_file("one.safetensors", state_dict),
        write_folder("two", state_dict, shards=2),
        write_folder("three", backwards, shards=3),
        tmp_path / "model.bin",
    ]
    assert len({digest(source) for source in sources}) == 1


def test_digest_follows_every_change(state_dict: StateDict) -> None:
    name = "model.position_ids"
    changed = {
        "value": {**state_dict, name: state_dict[name] + 1},
        "dtype": {**state_dict, name: state_dict[name].view(torch.float64)},
        "shape": {**state_dict, name: state_dict[name].reshape(1, 7)},
        "name": {k if k != name else "other": v for k, v in state_dict.items()},
        "fewer": {k: v for k, v in state_dict.items() if k != name},
        "empty_shape": {**state_dict, "model.empty": torch.empty(3, 0)},
    }
    assert len({digest(state_dict), *map(digest, changed.values())}) == 1 + len(changed)


def test_name_cannot_imitate_another_tensor() -> None:
    inner = "a" * 64
    two = [TensorInfo("x", "F32", (1,)), TensorInfo("y", "F32", (1,))]
    forged = [TensorInfo(f"x\0F32\x001\0{inner}\ny", "F32", (1,))]
    hashes = {"x": inner, "y": "b" * 64, forged[0].name: "b" * 64}
    assert content_digest(two, hashes) != content_digest(forged, hashes)


def test_tensor_longer_than_a_block_is_hashed_whole(tmp_path: Path) -> None:
    tensor = torch.arange(700_001, dtype=torch.int32)
    save_file({"t": tensor}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert hash_tensor(checkpoint, "t") == blake3(tensor.numpy().tobytes()).hexdigest()
    checkpoint.close()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_merge_records_the_digests_of_its_sources(
    kind: str, write_folder: Writer, write_file: Writer, state_dict: StateDict, tmp_path: Path
) -> None:
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state_dict.items()}
    base = write_file("base.safetensors", state_dict)
    model = write_folder("model", other, shards=3)
    output = tmp_path / ("out" if kind == "folder" else "out.safetensors")
    merge([model], base=base, method="task-arithmetic", output=output)
    if kind == "folder":
        record = json.loads((output / "orthomerge.json").read_text())
    else:
        record = json.loads(open_checkpoint(output).metadata["orthomerge"])
    found = [(source["role"], source["digest"]) for source in record["sources"]]
    assert found == [("base", digest(base)), ("model", digest(model))]


def test_merge_in_shards_has_the_digest_of_a_merge_in_one_file(
    write_file: Writer, state_dict: StateDict, tmp_path: Path
) -> None:
    source = write_file("a.safetensors", state_dict)
    for name, limit in (("one", 10**9), ("many", 60)):
        merge(
            [source, source],
            output=tmp_path / name,
            output_settings={"max_shard_size": limit},
        )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert digest(tmp_path / "one") == digest(tmp_path / "many") == digest(source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_whole_tensors_hashes_them_on_the_way(dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).to(dtype), "b": torch.ones(2).to(dtype)}
    tensors["t"] = tensors["a"].mT
    checkpoint = open_checkpoint(tensors)
    source = HashingSource(checkpoint)
    assert torch.equal(source.read("a"), tensors["a"])
    source.read("t")
    assert set(source.digests) == {"a", "t"}
    for name in tensors:  # b is read only now
        assert source.digest(name) == hash_tensor(checkpoint, name)
