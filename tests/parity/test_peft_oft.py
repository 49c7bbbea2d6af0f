"""OFT adapters made by PEFT itself: our effective weights are those of PEFT's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from oft_models import (
    MODULES,
    Net,
    Tensors,
    dense_weights,
    peft_weights,
    read_adapter,
    save_adapter,
)

from orthomerge.adapters import (
    AdapterConfig,
    OftAdapter,
    apply_rotation,
    rotation,
)
from orthomerge.linalg import merge_algebra, orthogonality

NEUMANN = [{"use_cayley_neumann": True, "num_cayley_neumann_terms": t} for t in (2, 3, 4, 5, 6)]
EXACT = {"use_cayley_neumann": False}
CASES: list[dict[str, Any]] = [
    *NEUMANN,
    EXACT,
    {"oft_block_size": 2},
    {"oft_block_size": 12},  # adjusted to 10 for the layer of 20 columns
    {"oft_block_size": 64},  # adjusted to one block per layer
    {"oft_block_size": 1},
    {"r": 2, **EXACT},
    {"r": 3},
    {"block_share": True},
    {"block_share": True, **EXACT},
    {"block_share": True, "r": 1, **EXACT},
    {"coft": True, "eps": 0.05},
    {"coft": True, "eps": 0.3, **EXACT},
    {"coft": True, "eps": 0.05, "block_share": True},
    {"coft": True, "eps": 0.0, **EXACT},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_dense_weight_equals_peft_merge(tmp_path: Path, options: dict[str, Any]) -> None:
    """Pins every sign: linear, embedding, convolution; exact map and series."""
    folder = save_adapter(tmp_path, seed=1, **options)
    expected, base = peft_weights(folder), Net().state_dict()
    ours = dense_weights(read_adapter(folder))
    assert set(ours) == {f"{name}.weight" for name in MODULES}
    for name, weight in ours.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)
        moved = float((weight - base[name]).abs().max())
        assert (moved > 1e-3) == (options.get("eps") != 0 and options.get("oft_block_size") != 1)


def test_the_two_conventions_turn_the_same_numbers_opposite_ways(tmp_path: Path) -> None:
    exact = read_adapter(save_adapter(tmp_path / "a", seed=1, **EXACT))
    series = read_adapter(save_adapter(tmp_path / "b", seed=1, **NEUMANN[3]))
    for name in MODULES:
        A, B = (one.skew(name, torch.float32) for one in (exact, series))
        assert torch.equal(A, -B)
        assert float(A.abs().max()) > 0.1


def test_exact_back_map_is_orthogonal_where_the_series_is_not(tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(tmp_path, seed=1))
    A = adapter.skew("body.up", torch.float64)
    assert orthogonality(rotation(A, adapter.convention, "exact"))[0]
    ok, residual = orthogonality(rotation(A, adapter.convention, "as_trained"))
    assert not ok
    assert 1e-5 < residual < 1e-1


def test_opposite_conventions_with_negated_numbers_merge_to_the_same_rotation(
    tmp_path: Path,
) -> None:
    """P19: what is stored has opposite signs, what is meant does not."""
    one = read_adapter(save_adapter(tmp_path / "a", seed=1, scale=0.05, **EXACT))
    two = read_adapter(save_adapter(tmp_path / "b", seed=2, scale=0.05, **EXACT))
    source = one.source
    assert isinstance(source, Tensors)
    negated = Tensors({key: -value for key, value in source.values.items()})
    config = AdapterConfig(
        "OFT", {**one.config.values, "use_cayley_neumann": True}, one.config.path
    )
    twin = OftAdapter.from_checkpoint(negated, config)
    for name in MODULES:
        other = two.skew(name, torch.float64)
        rotations = []
        for adapter in (one, twin):
            pair = torch.stack([adapter.skew(name, torch.float64), other])
            merged, _ = merge_algebra(pair, [1, 1])
            rotations.append(rotation(merged, adapter.convention))
        exact, series = rotations
        theta = float(torch.linalg.matrix_norm(merged, 2).max())
        assert float((exact - series).abs().max()) <= 2 * theta**4
        assert theta**4 < 0.05 * float((exact - torch.eye(exact.shape[-1])).abs().max())


# Oracle O2b: W_eff[0, :3] of a 6 x 8 layer with two packed 4 x 4 blocks, per format.
O2B = {
    (False, "0.21.2"): [1.8782405461, -0.2056762256, -0.8663908336],
    (True, "0.18.0"): [1.5121826708, -0.4815828375, -0.1951236525],
    (True, None): [1.5191432445, -0.4725951690, -0.1872853882],
    (True, "0.17.1"): [1.5191432445, -0.4725951690, -0.1872853882],
}
O2B_EXACT = [1.5087289067, -0.4704665144, -0.1896914962]


@pytest.mark.parametrize(("series", "version"), O2B)
def test_oracle_o2b_formats(series: bool, version: str | None) -> None:
    rs = np.random.RandomState(11)
    W = torch.from_numpy(rs.standard_normal((6, 8)))
    packed = torch.from_numpy(0.2 * rs.standard_normal((2, 6)))
    values = {"use_cayley_neumann": series, "num_cayley_neumann_terms": 5, "peft_version": version}
    adapter = OftAdapter.from_checkpoint(
        Tensors({"base_model.model.lin.oft_R.weight": packed.float()}),
        AdapterConfig("OFT", values, Path("adapter_config.json")),
    )
    adapter.source.values["base_model.model.lin.oft_R.weight"] = packed  # type: ignore[attr-defined]
    A = adapter.skew("lin", torch.float64)
    out = apply_rotation(W, rotation(A, adapter.convention))
    assert out[0, :3].tolist() == pytest.approx(O2B[series, version], abs=1e-10)
    if series:
        out = apply_rotation(W, rotation(A, adapter.convention, "exact"))
        assert out[0, :3].tolist() == pytest.approx(O2B_EXACT, abs=1e-10)
