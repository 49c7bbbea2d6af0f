"""Merges in the Lie algebra of every kind of adapter that rotates, through the whole engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from adapter_models import Layers, assert_same, make_adapter, our_merge, peft_merge

from orthomerge import merge, plan
from orthomerge.errors import AdapterError, OrthoMergeError
from orthomerge.merging.planning import draft, planner

TARGETS = ["up", "down", "conv"]
MODULES = ["body.up", "body.down", "conv"]
WIDTHS = {"body.up": (20, 12), "body.down": (12, 20), "conv": (6, 36)}


@pytest.fixture(autouse=True)
def every_kind_is_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's table of kinds is not what is tested here."""
    monkeypatch.setattr(planner, "_source_problems", lambda *_: [], raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    save_file(Layers().state_dict(), folder / "base.safetensors")
    exact = {"use_cayley_neumann": False, "oft_block_size": 4, "target_modules": TARGETS}
    configs = {
        "packed": peft.OFTConfig(**exact),
        "series": peft.OFTConfig(**{**exact, "use_cayley_neumann": True}),
        "boft": peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
        "hra": peft.HRAConfig(r=2, target_modules=TARGETS, init_weights=True),
        "odd": peft.HRAConfig(r=3, target_modules=TARGETS, init_weights=False),
        "half-turns": peft.HRAConfig(r=2, apply_GS=True, target_modules=TARGETS),
    }
    for seed, (name, config) in enumerate(configs.items()):
        make_adapter(folder / name, config, seed, 0.1)
    for seed in (1, 2):
        old_adapter(folder / f"full{seed}", seed, "full")
        old_adapter(folder / f"left{seed}", seed, "left")
    old_adapter(folder / "unscaled", 3, "full", spread=0.0)
    return folder


def old_adapter(folder: Path, seed: int, layout: str, spread: float = 0.1) -> None:
    """Write what PEFT before 0.16 would have."""
    rs = np.random.RandomState(seed)
    tensors = {}
    for name, (rows, columns) in WIDTHS.items():
        key = f"base_model.model.{name}.oft_"
        size = -(-rows // 3) if layout == "left" else columns // 4
        count = 3 if layout == "left" else 4
        tensors[f"{key}r"] = 0.1 * rs.standard_normal((count, size, size))
        if layout == "full":
            tensors[f"{key}s"] = 1 + spread * rs.standard_normal((rows, 1))
    folder.mkdir()
    arrays = {name: torch.from_numpy(value) for name, value in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "OFT", "r": count, "target_modules": TARGETS}
    if layout == "full":
        config["oft_block_size"] = 0
    (folder / "adapter_config.json").write_text(json.dumps(config))


def full(home: Path, *names: str, **settings: Any) -> dict[str, torch.Tensor]:
    base = settings.pop("base", home / "base.safetensors")
    found = merge([home / name for name in names], base=base, method="orthomerge", **settings)
    return dict(found.tensors)


@pytest.mark.parametrize("name", ["packed", "series", "boft", "hra", "full1", "left1", "unscaled"])
@pytest.mark.parametrize("pieces", [1 << 17, 1, 50])
def test_one_adapter_alone_is_itself(
    home: Path, name: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in small pieces, so that rows are turned and scaled in the right places."""
    monkeypatch.setattr(draft, "_CPU_PIECE", pieces)
    wanted = {k: v.float() for k, v in our_merge(home / name, torch.float64).items()}
    moved = assert_same(full(home, name), wanted)
    assert moved == {f"{module}.weight" for module in MODULES}


def generator(P: np.ndarray, columns: int) -> np.ndarray:
    """Dense skew part of full blocks."""
    A, size = np.zeros((columns, columns)), P.shape[-1]
    for k, block in enumerate(P):
        place = slice(k * size, (k + 1) * size)
        A[place, place] = (block - block.T) / 2
    return A


def test_full_blocks_merge_by_the_formula_and_scales_geometrically(home: Path) -> None:
    """S = sum w_i A_i, A = (sum w_i |A_i| / |S|) S, s = prod s_i^w_i, in numpy."""
    weights = [0.7, 0.3]
    merged = full(home, "full1", "full2", weights=weights)
    stored = [load_file(home / f"full{i}" / "adapter_model.safetensors") for i in (1, 2)]
    base = Layers().state_dict()
    for name, (rows, columns) in WIDTHS.items():
        key = f"base_model.model.{name}.oft_"
        As = [generator(one[f"{key}r"].numpy(), columns) for one in stored]
        S = sum(w * A for w, A in zip(weights, As, strict=True))
        norm = sum(w * np.linalg.norm(A) for w, A in zip(weights, As, strict=True))
        A = norm / np.linalg.norm(S) * S
        R = np.linalg.solve(np.eye(columns) - A, np.eye(columns) + A)
        s = np.prod(
            [one[f"{key}s"].numpy() ** w for one, w in zip(stored, weights, strict=True)], axis=0
        )
        W0 = base[f"{name}.weight"].double().numpy().reshape(rows, columns)
        expected = (s * (W0 @ R)).reshape(base[f"{name}.weight"].shape)
        np.testing.assert_allclose(merged[f"{name}.weight"].numpy(), expected, atol=1e-6)


def test_left_rotations_merge_on_their_side(home: Path) -> None:
    merged = full(home, "left1", "left2")
    stored = [load_file(home / f"left{i}" / "adapter_model.safetensors") for i in (1, 2)]
    base = Layers().state_dict()
    for name, (rows, _) in WIDTHS.items():
        blocks = [one[f"base_model.model.{name}.oft_r"].numpy() for one in stored]
        padded = 3 * blocks[0].shape[-1]
        As = [generator(P, padded) for P in blocks]
        S = sum(As)
        A = sum(np.linalg.norm(one) for one in As) / 2 / np.linalg.norm(S) * S
        L = np.linalg.solve(np.eye(padded) - A, np.eye(padded) + A)[:rows, :rows]
        W0 = base[f"{name}.weight"].double().numpy()
        expected = (L @ W0.reshape(rows, -1)).reshape(W0.shape)
        np.testing.assert_allclose(merged[f"{name}.weight"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "names",
    [
        ("packed", "unscaled"),
        ("packed", "hra"),
        ("hra", "series"),
        ("hra", "hra"),
        ("unscaled", "series", "hra"),
    ],
)
def test_mixed_kinds_as_an_adapter_in_peft_equal_the_full_checkpoint(
    home: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """P20 for mixed kinds: written as today's packed OFT, read by PEFT."""
    merge([home / name for name in names], method="orthomerge", output=tmp_path / "out")
    moved = assert_same(peft_merge(tmp_path / "out"), full(home, *names), 2e-6)
    assert moved == {f"{module}.weight" for module in MODULES}


def test_everything_on_the_right_side_merges(home: Path) -> None:
    names = ("packed", "series", "boft", "hra", "full1")
    one, other = full(home, *names), full(home, *names[::-1])
    assert len(assert_same(one, other)) == 3


def test_an_adapter_that_scales_is_not_written_as_one(home: Path) -> None:
    for name in ("full1", "boft"):
        with pytest.raises(AdapterError, match=r"cannot scale output features.*Pass --base"):
            plan([home / name], method="orthomerge")
    with pytest.raises(AdapterError, match=r"cannot rotate output features.*Pass --base"):
        plan([home / "left1", home / "left2"], method="orthomerge")


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("name", ["odd", "half-turns"])
def test_reflections_are_refused_with_a_remedy(home: Path, name: str, based: bool) -> None:
    base = {"base": home / "base.safetensors"} if based else {}
    with pytest.raises(AdapterError, match=r"orthomerge-decoupled with --base") as caught:
        plan([home / "packed", home / name], method="orthomerge", **base)
    assert caught.value.file == str(home / name)


def test_the_two_sides_do_not_mix(home: Path) -> None:
    with pytest.raises(OrthoMergeError, match=r"outputs.*orthomerge-decoupled with --base"):
        plan(
            [home / "left1", home / "packed"],
            base=home / "base.safetensors",
            method="orthomerge",
        )


def test_scales_without_a_mean_are_refused(home: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(home / "full2", tmp_path / "negative")
    path = tmp_path / "negative" / "adapter_model.safetensors"
    tensors = {k: -v if k.endswith("_s") else v for k, v in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(OrthoMergeError, match="differ in sign"):
        full(home, "full1", str(tmp_path / "negative"))
    assert len(assert_same(full(home, str(path.parent)), our_merge(path.parent))) == 3


def test_provenance_covers_the_scales(home: Path, tmp_path: Path) -> None:
    def digest(name: str) -> str:
        out = tmp_path / name.replace("/", "_")
        merge([home / name], base=home / "base.safetensors", method="orthomerge", output=out)
        sources = json.loads((out / "orthomerge.json").read_text())["sources"]
        return str(sources[1]["digest"])

    import shutil

    shutil.copytree(home / "full1", home / "rescaled")
    path = home / "rescaled" / "adapter_model.safetensors"
    save_file({k: 2 * v if k.endswith("_s") else v for k, v in load_file(path).items()}, path)
    assert digest("full1") != digest("rescaled")
