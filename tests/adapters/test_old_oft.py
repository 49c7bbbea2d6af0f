"""OFT adapters of PEFT before 0.16, against their formulas written out in numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orthomerge.adapters.sources import Source, open_source
from orthomerge.adapters.updates import adapter_updates
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.errors import AdapterError, OrthoMergeError

KEY = "base_model.model.lin"


def write(folder: Path, tensors: dict[str, Any], **config: Any) -> Source:
    folder.mkdir(exist_ok=True)
    arrays = {f"{KEY}.{name}": torch.from_numpy(np.asarray(v)) for name, v in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors")
    values = {"peft_type": "OFT", "r": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return open_source(folder)


def effective(source: Source, W: np.ndarray) -> np.ndarray:
    base = {"lin.weight": torch.from_numpy(W)}
    found = adapter_updates(source, open_checkpoint(base).tensors)
    delta = found.updates["lin.weight"].delta(base["lin.weight"], W.shape, torch.float64)
    return W + delta.numpy()


def blockdiag(blocks: list[np.ndarray]) -> np.ndarray:
    size = sum(len(block) for block in blocks)
    out, start = np.zeros((size, size)), 0
    for block in blocks:
        out[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return out


def old_map(P: np.ndarray) -> np.ndarray:
    """K = (I - S)(I + S)^{-1} with S the skew part."""
    S = (P - P.T) / 2
    eye = np.eye(len(P))
    return (eye - S) @ np.linalg.inv(eye + S)


def oracle() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rs = np.random.RandomState(11)
    W = rs.standard_normal((6, 8))
    rs.standard_normal((2, 6))
    left = 0.2 * rs.standard_normal((2, 3, 3))
    full = 0.2 * rs.standard_normal((2, 4, 4))
    return W, left, full, 1 + 0.1 * rs.standard_normal((6, 1))


def test_oracle_o2b_before_0_14(tmp_path: Path) -> None:
    W, left, _, _ = oracle()
    source = write(tmp_path, {"oft_r": left})
    assert source.description == "OFT adapter of PEFT before 0.14 (rotates output features)"
    out = effective(source, W)
    expected = [1.7069799934, -0.7104225975, -0.6804990233]
    assert out[0, :3].tolist() == pytest.approx(expected, abs=1e-10)


def test_oracle_o2b_0_14(tmp_path: Path) -> None:
    W, _, full, s = oracle()
    source = write(tmp_path, {"oft_r": full, "oft_s": s}, oft_block_size=0)
    assert source.description == "OFT adapter of PEFT 0.14 or 0.15 (full blocks and a scale)"
    out = effective(source, W)
    expected = [0.8413350321, -1.6911299833, -0.7676478076]
    assert out[0, :3].tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-3, 0.02, 10.0])
def test_left_blocks_are_cut_and_shared_and_projected(
    tmp_path: Path, shared: bool, eps: float | None
) -> None:
    """10 rows in 4 blocks of 3: W_eff = (K[:10, :10])^T W; coft's radius is eps b^2 / sqrt(nb)."""
    rs = np.random.RandomState(3)
    W, P = rs.standard_normal((10, 2, 3)), rs.standard_normal((1 if shared else 4, 3, 3))
    config = {"block_share": shared, "coft": eps is not None, "eps": eps}
    out = effective(write(tmp_path, {"oft_r": P}, **config), W)
    if eps is not None:
        radius = eps * 9 / math.sqrt(len(P))
        P = np.stack([p * min(1, radius / np.sqrt((p**2).sum())) for p in P])
    blocks = [old_map(p) for p in (P.repeat(4, 0) if shared else P)]
    K = blockdiag(blocks)[:10, :10]
    np.testing.assert_allclose(out, np.einsum("ji,jab->iab", K, W), atol=1e-14)
    assert np.abs(out - W).max() > 1e-3


@pytest.mark.parametrize("eps", [None, 1e-3, 10.0])
def test_full_blocks_of_a_convolution_with_coft(tmp_path: Path, eps: float | None) -> None:
    """coft's radius is eps ceil(o / r)^2 / sqrt(r) with r blocks."""
    rs = np.random.RandomState(4)
    W, P = rs.standard_normal((5, 2, 3, 3)), rs.standard_normal((3, 6, 6))
    s = 1 + 0.1 * rs.standard_normal((1, 5))
    config = {"oft_block_size": 6, "r": 0, "coft": eps is not None, "eps": eps}
    out = effective(write(tmp_path, {"oft_r": P, "oft_s": s}, **config), W)
    if eps is not None:
        radius = eps * math.ceil(5 / 3) ** 2 / math.sqrt(3)
        P = np.stack([p * min(1, radius / np.sqrt((p**2).sum())) for p in P])
    K = blockdiag([old_map(p) for p in P])
    expected = (s.T * (W.reshape(5, 18) @ K.T)).reshape(W.shape)
    np.testing.assert_allclose(out, expected, atol=1e-14)


def test_full_blocks_may_be_shared(tmp_path: Path) -> None:
    W, _, full, s = oracle()
    source = write(tmp_path, {"oft_r": full[:1], "oft_s": s}, oft_block_size=0, block_share=True)
    K = blockdiag([old_map(full[0])] * 2)
    np.testing.assert_allclose(effective(source, W), s * (W @ K.T), atol=1e-14)


Z = np.zeros


@pytest.mark.parametrize(
    ("tensors", "config", "problem"),
    [
        ({"oft_r": Z((2, 3, 4))}, {}, "not a list of square blocks"),
        ({"oft_r": Z((2, 3, 3))}, {"oft_block_size": 0}, "has no scale"),
        ({"oft_s": Z((6, 1))}, {}, "scales a module that is not rotated"),
        ({"oft_r": Z((2, 4, 4)), "oft_s": Z((6, 2))}, {}, "not one scale per output"),
        ({"oft_r": Z((2, 3, 3))}, {"block_share": True}, "several blocks although block_share"),
        ({"oft_r": Z((2, 3, 3)), "oft_R.weight": Z((2, 3))}, {}, "tensors of two layouts"),
        ({"oft_r": Z((2, 3, 3)), "other.oft_R.weight": Z((2, 3))}, {}, "several PEFT versions"),
        ({"oft_r": Z((2, 3, 3), np.int32)}, {}, "unsupported dtype"),
    ],
)
def test_malformed_adapters_give_one_clear_error(
    tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(AdapterError, match=problem) as caught:
        write(tmp_path, tensors, **config)
    assert (caught.value.tensor or "").startswith(KEY)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("tensors", "shape"),
    [
        ({"oft_r": Z((2, 3, 3))}, (7, 8)),
        ({"oft_r": Z((2, 3, 3))}, (6,)),
        ({"oft_r": Z((2, 4, 4)), "oft_s": Z((6, 1))}, (6, 9)),
        ({"oft_r": Z((2, 4, 4)), "oft_s": Z((6, 1))}, (7, 8)),
    ],
)
def test_a_base_of_another_shape_is_refused(
    tmp_path: Path, tensors: dict[str, Any], shape: tuple[int, ...]
) -> None:
    with pytest.raises(OrthoMergeError, match="does not fit this weight"):
        effective(write(tmp_path, tensors), np.zeros(shape))


def test_shared_blocks_with_coft_need_a_width_that_is_not_stored(tmp_path: Path) -> None:
    config = {"oft_block_size": 4, "block_share": True, "coft": True}
    source = write(tmp_path, {"oft_r": Z((1, 4, 4)), "oft_s": Z((6, 1))}, **config)
    with pytest.raises(AdapterError, match="coft together with block_share"):
        effective(source, np.zeros((6, 8)))
