"""What a merged OFT adapter is written as: numbers, convention, sizes, config."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthomerge.adapters import (
    EXACT,
    AdapterConfig,
    MergedModule,
    OftAdapter,
    OftConvention,
    adjusted_divisor,
    common_convention,
    common_setting,
    merged_oft_config,
    oft_key,
    stored_from_canonical,
)
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import AdapterError
from orthomerge.linalg import unpack_skew

SERIES = OftConvention(True, 5)
LEGACY = OftConvention(True, 5, legacy=True)


class OneModule:
    """An adapter that rotates the modules ``names``, all by the same numbers."""

    origin = "adapter"

    def __init__(self, names: tuple[str, ...], packed: torch.Tensor, kind: Any = "linear") -> None:
        keys = [oft_key(name, kind) for name in names]
        self.tensors = {key: TensorInfo(key, "F32", tuple(packed.shape)) for key in keys}
        self.packed = packed

    def read(self, name: str) -> torch.Tensor:
        return self.packed


def adapter(*names: str, kind: Any = "linear", **values: Any) -> OftAdapter:
    packed = torch.arange(1.0, 13.0).reshape(2, 6)
    defaults = {
        "peft_version": "0.21.2",
        "target_modules": list(names),
        "base_model_name_or_path": "base/model",
    }
    config = AdapterConfig("OFT", {**defaults, **values}, Path("config.json"))
    return OftAdapter.from_checkpoint(OneModule(names, packed, kind), config)


@pytest.mark.parametrize(("kind", "series"), list(product(["linear", "embedding"], [False, True])))
def test_stored_numbers_round_trip(kind: Any, series: bool) -> None:
    one = adapter("q", kind=kind, use_cayley_neumann=series)
    stored = stored_from_canonical(one.skew("q", torch.float32), kind, one.convention)
    assert torch.equal(stored, one.source.read(""))


def test_common_convention() -> None:
    def common(*settings: dict[str, Any]) -> OftConvention | None:
        return common_convention([adapter("q", **values) for values in settings])

    exact, series = {"use_cayley_neumann": False}, {"use_cayley_neumann": True}
    terms = [{"num_cayley_neumann_terms": count} for count in range(7)]
    assert common(exact, exact) == EXACT
    assert common(series, series) == SERIES
    assert common(series, exact) is None
    assert common(terms[5], terms[6]) is None
    assert common(terms[3], terms[4]) == OftConvention(True, 4)
    assert common(terms[3]) == OftConvention(True, 4)
    old = {"peft_version": None}
    assert common(old, old) is None
    assert common(old, series) is None
    assert common({**old, **exact}, exact) == EXACT


def test_legacy_is_never_written() -> None:
    with pytest.raises(AdapterError, match=r"0\.16 and 0\.17 cannot be written"):
        stored_from_canonical(torch.zeros(1, 2, 2), "linear", LEGACY)
    with pytest.raises(AdapterError, match=r"0\.16 and 0\.17 cannot be written"):
        merged_oft_config([adapter("q")], LEGACY, {"q": MergedModule(8, 4)})


widths = st.integers(1, 80)


@settings(max_examples=60, deadline=None)
@given(st.lists(widths, min_size=1, max_size=3), st.integers(1, 90), st.booleans())
def test_a_setting_is_found_for_whatever_peft_built(
    columns: list[int], value: int, by_count: bool
) -> None:
    built = [adjusted_divisor(width, value) for width in columns]
    blocks = [w // b for w, b in zip(columns, built, strict=True)] if by_count else built
    name, found = common_setting(set(zip(columns, blocks, strict=True)))
    rebuilt = [adjusted_divisor(width, found) for width in columns]
    counts = [w // b for w, b in zip(columns, rebuilt, strict=True)]
    assert (rebuilt if name == "oft_block_size" else counts) == blocks


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_setting_exists_where_none_is_found(data: st.DataObject) -> None:
    pairs = set()
    for _ in range(2):
        width = data.draw(widths)
        divisors = [size for size in range(1, width + 1) if width % size == 0]
        pairs.add((width, data.draw(st.sampled_from(divisors))))
    by_size = [v for v in range(1, 100) if all(adjusted_divisor(w, v) == b for w, b in pairs)]
    by_count = [v for v in range(1, 100) if all(adjusted_divisor(w, v) == w // b for w, b in pairs)]
    if by_size or by_count:
        name, value = common_setting(pairs)
        assert value in (by_size if name == "oft_block_size" else by_count)
        assert name == "oft_block_size" or not by_size
    else:
        with pytest.raises(AdapterError, match="no single oft_block_size or r"):
            common_setting(pairs)


def test_a_size_that_needs_no_adjustment_is_preferred() -> None:
    assert common_setting({(64, 32), (160, 32)}) == ("oft_block_size", 32)
    assert common_setting({(64, 64)}) == ("oft_block_size", 64)
    assert common_setting({(12, 3), (36, 9)}) == ("r", 4)


def test_config_of_a_plain_merge() -> None:
    adapters = [
        adapter("a.q", "a.v", target_modules=["v", "q"], task_type="CAUSAL_LM", revision="main"),
        adapter("a.k", target_modules=["k"], task_type="CAUSAL_LM", base_model_name_or_path="x"),
    ]
    modules = {name: MergedModule(8, 4) for name in ("a.q", "a.v", "a.k")}
    config = merged_oft_config(adapters, SERIES, modules)
    expected = {
        "peft_type": "OFT",
        "base_model_name_or_path": "base/model",
        "revision": "main",
        "target_modules": ["k", "q", "v"],
        "oft_block_size": 4,
        "r": 0,
        "coft": False,
        "block_share": False,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "peft_version": "0.18.0",
        "task_type": "CAUSAL_LM",
        "exclude_modules": None,
        "layers_to_transform": None,
    }
    assert expected.items() <= config.items()


def targets(adapters: list[OftAdapter], names: list[str], base: tuple[str, ...] = ()) -> Any:
    modules = {name: MergedModule(8, 4) for name in names}
    return merged_oft_config(adapters, EXACT, modules, base)["target_modules"]


@pytest.mark.parametrize(
    "narrowing",
    [
        {"target_modules": r".*\.q"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q"], "layers_to_transform": [0]},
        {"target_modules": ["q"], "exclude_modules": ["b.q"]},
        {"target_modules": None},
    ],
    ids=str,
)
def test_narrowed_targets_are_spelled_out(narrowing: dict[str, Any]) -> None:
    pair = [adapter("a.q", **narrowing), adapter("a.v", target_modules=["v"])]
    assert targets(pair, ["a.v", "a.q"]) == ["a.q", "a.v"]


def test_targets_are_spelled_out_when_the_names_would_match_more() -> None:
    one = adapter("a.q", "a.v", target_modules=["q", "v"])
    assert targets([one], ["a.q", "a.v"]) == ["q", "v"]
    assert targets([one], ["a.q"]) == ["a.q"]
    assert targets([one], ["a.q", "a.v"], ("a.q", "a.v", "b.q")) == ["a.q", "a.v"]
    assert targets([one], ["a.q", "a.v"], ("a.q", "a.v", "b.a.q")) == r"a\.q|a\.v"


def test_a_module_rotated_here_and_saved_there_is_refused() -> None:
    pair = [adapter("head.dense"), adapter("a.q", modules_to_save=["head"])]
    modules = {name: MergedModule(8, 4) for name in ("head.dense", "a.q")}
    with pytest.raises(AdapterError, match=r"'head\.dense'.*saved whole \('head'\)"):
        merged_oft_config(pair, EXACT, modules)


def test_unions_and_disagreements() -> None:
    pair = [
        adapter("q", modules_to_save=["head"], bias="oft_only", task_type="SEQ_CLS"),
        adapter("q", modules_to_save=["extra", "head"], bias="all", task_type="CAUSAL_LM"),
    ]
    config = merged_oft_config(pair, EXACT, {"q": MergedModule(8, 4)})
    assert config["modules_to_save"] == ["extra", "head"]
    assert config["bias"] == "all"
    assert config["task_type"] is None
    assert config["use_cayley_neumann"] is False


def test_shared_blocks_must_be_shared_by_all() -> None:
    one = adapter("q", "k")
    shared = MergedModule(8, 4, shared=True)
    assert merged_oft_config([one], EXACT, {"q": shared, "k": shared})["block_share"] is True
    with pytest.raises(AdapterError, match="some modules share one block"):
        merged_oft_config([one], EXACT, {"q": shared, "k": MergedModule(8, 4)})


def test_embeddings_need_the_peft_that_introduced_them() -> None:
    one = adapter("q", kind="embedding")
    config = merged_oft_config([one], EXACT, {"q": MergedModule(8, 4, "embedding")})
    assert config["peft_version"] == "0.19.0"


def test_stored_blocks_of_a_regrouped_layer_are_packed() -> None:
    A = unpack_skew(torch.arange(1.0, 7.0).reshape(1, 6))
    assert stored_from_canonical(A, "linear", EXACT).tolist() == [[1, 2, 3, 4, 5, 6]]
