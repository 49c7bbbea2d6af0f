"""Recognising OFT adapters by their headers: layouts, conventions, and every refusal."""

from __future__ import annotations

import doctest
import importlib
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from orthomerge.adapters import (
    EXACT,
    AdapterConfig,
    OftAdapter,
    OftConvention,
    apply_rotation,
    rotation,
)
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import AdapterError, NumericalError, ProblemsError, UnknownNameError
from orthomerge.linalg import cayley, unpack_skew

PREFIX = "base_model.model."


@dataclass
class Headers:
    """Headers only; ``read`` gives prepared values."""

    tensors: Mapping[str, TensorInfo]
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    origin: str = "adapter/"

    def read(self, name: str) -> torch.Tensor:
        return self.values[name]


def headers(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> Headers:
    return Headers({PREFIX + n: TensorInfo(PREFIX + n, dtype, s) for n, s in shapes.items()})


def config(peft_type: str = "OFT", **values: Any) -> AdapterConfig:
    return AdapterConfig(peft_type, {"peft_version": "0.21.2", **values}, Path("a/config.json"))


def read(shapes: dict[str, tuple[int, ...]], dtype: str = "F32", **values: Any) -> OftAdapter:
    return OftAdapter.from_checkpoint(headers(shapes, dtype), config(**values))


def test_modules_come_from_headers_alone() -> None:
    adapter = read(
        {"a.q.oft_R.weight": (4, 120), "emb.oft_embedding_R.weight": (2, 6)}, oft_block_size=32
    )
    query, embedding = adapter.modules["a.q"], adapter.modules["emb"]
    assert (query.kind, query.num_blocks, query.block_size) == ("linear", 4, 16)
    assert (embedding.kind, embedding.num_blocks, embedding.block_size) == ("embedding", 2, 4)
    assert query.key == PREFIX + "a.q.oft_R.weight"
    assert (query.shared, query.dtype, adapter.origin) == (False, "F32", "adapter/")


def test_other_tensors_are_told_apart() -> None:
    adapter = read(
        {
            "a.q.oft_R.weight": (1, 6),
            "head.weight": (2, 4),
            "a.q.base_layer.bias": (4,),
            "emb.base_layer.weight": (7, 4),
            "soft_prompt.weight": (2, 2),
        }
    )
    assert adapter.others == {
        "head.weight": PREFIX + "head.weight",
        "a.q.bias": PREFIX + "a.q.base_layer.bias",
        "soft_prompt.weight": PREFIX + "soft_prompt.weight",
    }
    assert adapter.base_copies == {"emb.weight": PREFIX + "emb.base_layer.weight"}


def test_block_share() -> None:
    assert read({"q.oft_R.weight": (1, 6)}, block_share=True).modules["q"].shared
    with pytest.raises(AdapterError, match="block_share"):
        read({"q.oft_R.weight": (2, 6)}, block_share=True)


@pytest.mark.parametrize(
    ("values", "convention"),
    [
        ({"use_cayley_neumann": False, "num_cayley_neumann_terms": 7}, EXACT),
        ({"use_cayley_neumann": False, "peft_version": None}, EXACT),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}, OftConvention(True, 3)),
        ({}, OftConvention(True, 5)),
        ({"peft_version": None}, OftConvention(True, 5, legacy=True)),
        ({"peft_version": "0.17.2.dev0@abc"}, OftConvention(True, 5, legacy=True)),
        ({"peft_version": "0.18.0"}, OftConvention(True, 5)),
        ({"peft_version": "0.20.1.dev0@abc"}, OftConvention(True, 5)),
        ({"peft_version": "1.0"}, OftConvention(True, 5)),
    ],
)
def test_convention(values: dict[str, Any], convention: OftConvention) -> None:
    assert OftConvention.from_config(config(**values)) == convention


@pytest.mark.parametrize(
    "values",
    [
        {"num_cayley_neumann_terms": 1},
        {"num_cayley_neumann_terms": "5"},
        {"use_cayley_neumann": "yes"},
        {"peft_version": "unknown"},
    ],
)
def test_impossible_conventions_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=next(iter(values))):
        OftConvention.from_config(config(**values))


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("q.oft_r", (4, 8, 7), "not a list of square blocks"),
        ("q.oft_r", (8, 8), "not a list of square blocks"),
        ("q.oft_s", (8, 1), "scales a module that is not rotated"),
        ("q.oft_R.default.weight", (2, 6), "no parameter of a known OFT layout"),
        ("q.oft_Q.weight", (2, 6), "no parameter of a known OFT layout"),
        ("q.lora_A.weight", (4, 8), "'lora_A' is no parameter of a known OFT layout"),
        ("q.boft_R", (1, 2, 4, 4), "'boft_R' is no parameter"),
        ("q.hra_u", (8, 4), "'hra_u' is no parameter"),
        ("q.oft_R.weight", (2, 7), "not packed skew blocks .*found 7"),
        ("q.oft_R.weight", (2, 4, 4), "not a list of packed blocks"),
        ("q.oft_R.weight", (0, 6), "not a list of packed blocks"),
    ],
)
def test_other_layouts_are_refused(name: str, shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(AdapterError, match=problem) as caught:
        read({name: shape})
    assert caught.value.tensor == PREFIX + name
    assert caught.value.file == "adapter/"
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("dtype", ["I8", "I32", "U8", "F8_E4M3"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(AdapterError, match=f"unsupported dtype .*found {dtype}"):
        read({"q.oft_R.weight": (2, 6)}, dtype)


def test_other_adapter_kinds_and_empty_adapters_are_refused() -> None:
    with pytest.raises(AdapterError, match="is a LORA adapter"):
        OftAdapter.from_checkpoint(headers({"q.oft_R.weight": (2, 6)}), config("LORA"))
    with pytest.raises(AdapterError, match="holds no OFT tensors"):
        read({"head.weight": (2, 4)})


def test_problems_are_reported_together_but_once_per_kind() -> None:
    source = headers(
        {"q.oft_R.weight": (2, 7), "k.oft_R.weight": (2, 7), "v.lora_A.weight": (2, 2)}
    )
    unprefixed = TensorInfo("z.oft_R.weight", "F32", (2, 6))
    source.tensors = {**source.tensors, unprefixed.name: unprefixed}
    with pytest.raises(ProblemsError) as caught:
        OftAdapter.from_checkpoint(source, config())
    assert [error.tensor for error in caught.value.problems] == [
        PREFIX + "v.lora_A.weight",
        "z.oft_R.weight",
        PREFIX + "q.oft_R.weight",
    ]


def test_one_module_rotated_twice_is_refused() -> None:
    with pytest.raises(AdapterError, match="another tensor rotates"):
        read({"q.oft_R.weight": (2, 6), "q.oft_embedding_R.weight": (2, 6)})


def adapter_with(packed: torch.Tensor, **values: Any) -> OftAdapter:
    source = headers({"q.oft_R.weight": tuple(packed.shape)})
    source.values = {PREFIX + "q.oft_R.weight": packed}
    return OftAdapter.from_checkpoint(source, config(**values))


def test_skew_is_lifted_to_the_asked_dtype() -> None:
    packed = torch.randn(2, 6).bfloat16()
    A = adapter_with(packed, use_cayley_neumann=False).skew("q", torch.float64)
    assert torch.equal(A, unpack_skew(packed.double()))


def test_coft_keeps_blocks_inside_the_ball() -> None:
    packed = torch.tensor([[3.0], [0.001], [0.0]], dtype=torch.float64)
    A = adapter_with(packed, use_cayley_neumann=False, coft=True, eps=0.3).skew("q", torch.float64)
    radius = 0.3 / math.sqrt(3)  # of the Frobenius norm, which counts each number twice
    expected = torch.tensor([radius / math.sqrt(2), 0.001, 0.0], dtype=torch.float64)
    torch.testing.assert_close(A[:, 0, 1], expected)
    frozen = adapter_with(packed, coft=True, eps=0.0).skew("q", torch.float64)
    assert torch.equal(frozen.abs(), torch.zeros(3, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    with pytest.raises(NumericalError, match=r"adapter/.*q\.oft_R\.weight.*NaN or infinite"):
        adapter_with(torch.full((2, 6), value)).skew("q", torch.float32)


def test_convolution_weights_are_rotated_as_matrices() -> None:
    A = unpack_skew(torch.randn(2, 153, dtype=torch.float64))
    W = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    out = apply_rotation(W, cayley(A))
    assert out.shape == W.shape
    expected = W.reshape(5, 36) @ torch.block_diag(*cayley(A))
    torch.testing.assert_close(out.reshape(5, 36), expected)


@pytest.mark.parametrize(
    ("shape", "shared"), [((3, 10), False), ((3, 10), True), ((12,), False), ((3, 4), False)]
)
def test_rotations_that_do_not_fit_are_refused(shape: tuple[int, ...], shared: bool) -> None:
    R = torch.eye(4).repeat(1 if shared else 3, 1, 1)
    with pytest.raises(AdapterError, match="does not fit this weight") as caught:
        apply_rotation(torch.ones(shape), R, shared=shared, name="q.weight")
    assert caught.value.tensor == "q.weight"


def test_one_block_fits_wider_weights_only_when_shared() -> None:
    R = cayley(unpack_skew(torch.randn(1, 6)))
    assert apply_rotation(torch.ones(3, 12), R, shared=True).shape == (3, 12)
    with pytest.raises(AdapterError, match="expected 4 columns"):
        apply_rotation(torch.ones(3, 12), R)


def test_unknown_back_map_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="as_trained"):
        rotation(torch.zeros(1, 2, 2), EXACT, "as-trained")  # type: ignore[arg-type]


def test_the_room_opens_without_heavy_imports() -> None:
    heavy = ("torch", "peft", "transformers", "numpy")
    code = f"import sys, orthomerge.adapters; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "boft",
        "config",
        "convention",
        "effective",
        "export",
        "keys",
        "lora_export",
        "lora_settings",
        "oft",
        "sizes",
        "targets",
    ],
)
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"orthomerge.adapters.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
