"""Where output bytes go: shard limits, alignment, order, names, index."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthomerge.checkpoints.dtypes import ITEM_SIZES
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.layout import Layout, plan_layout

DTYPES = st.sampled_from(sorted(ITEM_SIZES))
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(DTYPES, SHAPES), max_size=12).map(
    lambda rows: [TensorInfo(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(rows)]
)


def infos(*sizes: int) -> list[TensorInfo]:
    return [TensorInfo(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]


def names_by_shard(layout: Layout) -> list[list[str]]:
    return [[info.name for info in shard.tensors] for shard in layout.shards]


@given(TENSORS, st.integers(1, 200))
def test_layout_places_every_tensor_once_aligned_and_within_the_limit(
    tensors: list[TensorInfo], limit: int
) -> None:
    layout = plan_layout(tensors, max_shard_bytes=limit)
    assert list(layout.places) == [name for names in names_by_shard(layout) for name in names]
    assert sorted(layout.places) == sorted(info.name for info in tensors)
    for shard in layout.shards:
        position = len(shard.header)
        assert position % 8 == 0
        for info in shard.tensors:
            assert layout.places[info.name].shard == shard.filename
            assert layout.places[info.name].offset == position
            assert position % ITEM_SIZES[info.dtype] == 0
            position += info.nbytes
        assert position == shard.nbytes
        assert position - len(shard.header) <= limit or len(shard.tensors) == 1
    assert layout.nbytes == sum(shard.nbytes for shard in layout.shards)


def test_shards_are_filled_in_order() -> None:
    layout = plan_layout(infos(40, 60, 1, 99, 100), max_shard_bytes=100)
    assert names_by_shard(layout) == [["t0", "t1"], ["t2", "t3"], ["t4"]]


def test_tensor_above_the_limit_gets_a_shard_of_its_own() -> None:
    layout = plan_layout(infos(10, 500, 10), max_shard_bytes=100)
    assert names_by_shard(layout) == [["t0"], ["t1"], ["t2"]]


def test_wider_items_come_first_within_a_shard() -> None:
    dtypes = ("U8", "F64", "BF16", "F32", "I64")
    tensors = [TensorInfo(dtype, dtype, (1,)) for dtype in dtypes]
    layout = plan_layout(tensors, max_shard_bytes=1000)
    assert names_by_shard(layout) == [["F64", "I64", "F32", "BF16", "U8"]]


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    layout = plan_layout(infos(1, 2), max_shard_bytes=100, filename="adapter_model.safetensors")
    assert [shard.filename for shard in layout.shards] == ["adapter_model.safetensors"]
    assert layout.index_json() is None


def test_several_shards_are_numbered_and_indexed() -> None:
    layout = plan_layout(infos(3, 4, 5), max_shard_bytes=7)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert [shard.filename for shard in layout.shards] == [first, second]
    text = layout.index_json()
    assert text is not None
    assert json.loads(text) == {
        "metadata": {"total_size": 12},
        "weight_map": {"t0": first, "t1": first, "t2": second},
    }


def test_no_tensors_make_one_empty_file() -> None:
    layout = plan_layout([], max_shard_bytes=1)
    assert [shard.filename for shard in layout.shards] == ["model.safetensors"]
    assert layout.places == {}


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "orthomerge": "{}"}])
def test_metadata_is_in_every_header(metadata: dict[str, str] | None) -> None:
    for shard in plan_layout(infos(3, 4), max_shard_bytes=4, metadata=metadata).shards:
        header = json.loads(shard.header[8:])
        assert header["__metadata__"] == (metadata or {"format": "pt"})
