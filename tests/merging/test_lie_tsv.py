"""lie-tsv through the engine, on OFT adapters that PEFT wrote."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orthomerge import merge

peft = pytest.importorskip("peft")

BLOCK = 8
MODULES = {"up": (16, 20), "down": (24, 16)}  # inputs, outputs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, size in MODULES.items():
            setattr(self, name, nn.Linear(*size))


def write(folder: Path, blocks: dict[str, np.ndarray], neumann: bool = False) -> Path:
    """Let PEFT write an adapter; put ``blocks`` (generators, W = W_0 Cayley(A)) into it."""
    config = peft.OFTConfig(
        target_modules=list(MODULES), oft_block_size=BLOCK, use_cayley_neumann=neumann
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(Net(), config).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    rows, columns = np.triu_indices(BLOCK, 1)
    tensors = load_file(path)
    for key in tensors:
        (name,) = (n for n in MODULES if f".{n}." in key)
        A = blocks[name] if not neumann else -blocks[name]
        tensors[key] = torch.tensor(np.ascontiguousarray(A[:, rows, columns]), dtype=torch.float32)
    save_file(tensors, path)
    return folder


def dense(packed: torch.Tensor) -> np.ndarray:
    rows, columns = np.triu_indices(BLOCK, 1)
    A = np.zeros((len(packed), BLOCK, BLOCK))
    A[:, rows, columns] = packed.double().numpy()
    return A - A.transpose(0, 2, 1)


def random_blocks(seed: int, scale: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {}
    for name, (inputs, _) in MODULES.items():
        G = scale * rng.standard_normal((inputs // BLOCK, BLOCK, BLOCK))
        # what fp32 stores, so that the oracle sees the same numbers
        out[name] = np.float32(G - G.transpose(0, 2, 1)).astype(np.float64)
    return out


def merged(folder: Path, experts, weights=None, output=None, **settings) -> dict[str, np.ndarray]:
    folders = [write(folder / f"a{at}", blocks) for at, blocks in enumerate(experts)]
    result = merge(folders, method="lie-tsv", weights=weights, output=output, **settings)
    tensors = result.tensors or load_file(output / "adapter_model.safetensors")
    return {name: dense(v) for key, v in tensors.items() for name in MODULES if f".{name}." in key}


def planes_oracle(blocks: list[np.ndarray], planes: int, weights) -> np.ndarray:
    """P blkdiag(θ J) P^T of one block, by singular vectors: the pairs of equal θ span planes."""
    frames, angles = [], []
    for A, weight in zip(blocks, weights, strict=True):
        # i A (x + i y) = θ (x + i y) means A x = θ y and A y = -θ x, with |x| = |y| = 1 / √2
        values, vectors = np.linalg.eigh(1j * A)
        for at in np.argsort(-values)[:planes]:
            frames += [np.sqrt(2) * vectors[:, at].real, np.sqrt(2) * vectors[:, at].imag]
            angles.append(weight * values[at])
    U, _, Vh = np.linalg.svd(np.stack(frames, 1), full_matrices=False)
    P = U @ Vh
    out = np.zeros_like(blocks[0])
    for j, angle in enumerate(angles):
        x, y = P[:, 2 * j], P[:, 2 * j + 1]
        out += angle * (np.outer(y, x) - np.outer(x, y))
    return out


def oracle(experts, planes, weights=None, strength=1.0):
    weights = weights or [1.0] * len(experts)
    out = {}
    for name in MODULES:
        per_block = zip(*(e[name] for e in experts), strict=True)
        found = [planes_oracle(list(blocks), planes, weights) for blocks in per_block]
        out[name] = strength * np.stack(found)
    return out


def close(found, wanted, tolerance=2e-7) -> None:
    assert found.keys() == wanted.keys() == MODULES.keys()
    for name, A in found.items():
        np.testing.assert_allclose(A, wanted[name], atol=tolerance)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equals_the_planes_oracle(tmp_path, count) -> None:
    experts = [random_blocks(seed) for seed in range(count)]
    close(merged(tmp_path, experts), oracle(experts, max(1, BLOCK // (2 * count))))


def test_weights_strength_and_number_of_planes(tmp_path) -> None:
    experts = [random_blocks(seed) for seed in range(2)]
    found = merged(tmp_path, experts, [0.5, 2.0], strength=0.7, planes=1)
    close(found, oracle(experts, 1, [0.5, 2.0], 0.7))


def test_one_expert_is_itself(tmp_path) -> None:
    expert = random_blocks(0)
    close(merged(tmp_path, [expert]), expert)


def test_result_is_skew_by_construction_and_its_planes_commute(tmp_path) -> None:
    """Each merged block has as many planes as were kept, with the experts' own angles."""
    experts = [random_blocks(seed) for seed in range(2)]
    found = merged(tmp_path, experts)
    for name, blocks in found.items():
        for at, A in enumerate(blocks):
            kept = [np.linalg.svd(e[name][at])[1][:4] for e in experts]
            wanted = np.sort(np.concatenate(kept))[::-1]
            np.testing.assert_allclose(np.linalg.svd(A)[1], wanted, atol=1e-6)


def test_order_does_not_matter(tmp_path) -> None:
    experts = [random_blocks(seed) for seed in range(3)]
    one = merged(tmp_path / "one", experts, [1.0, 2.0, 0.5])
    close(merged(tmp_path / "two", experts[::-1], [0.5, 2.0, 1.0]), one)


def test_turning_every_block_turns_the_result(tmp_path) -> None:
    rng = np.random.default_rng(9)
    G = np.linalg.qr(rng.standard_normal((BLOCK, BLOCK)))[0]
    experts = [random_blocks(seed) for seed in range(3)]
    turned = [{name: G.T @ A @ G for name, A in e.items()} for e in experts]
    wanted = {name: G.T @ A @ G for name, A in merged(tmp_path / "a", experts).items()}
    close(merged(tmp_path / "b", turned), wanted, 1e-6)


def test_disjoint_planes_are_summed_exactly(tmp_path) -> None:
    rng = np.random.default_rng(8)
    P = np.linalg.qr(rng.standard_normal((BLOCK, BLOCK)))[0]

    def plane(at: int, angle: float) -> np.ndarray:
        x, y = P[:, 2 * at], P[:, 2 * at + 1]
        return angle * (np.outer(x, y) - np.outer(y, x))

    experts = []
    for at in (0, 2):
        A = plane(at, 0.3) + plane(at + 1, -0.2)
        experts.append({name: np.stack([A] * (s[0] // BLOCK)) for name, s in MODULES.items()})
    wanted = {name: experts[0][name] + experts[1][name] for name in MODULES}
    close(merged(tmp_path, experts), wanted)


def test_more_planes_than_the_block_holds(tmp_path) -> None:
    """Five experts with a plane each in a block of eight: still skew, finite, symmetric in them."""
    experts = [random_blocks(seed) for seed in range(5)]
    found = merged(tmp_path / "a", experts)
    close(merged(tmp_path / "b", experts[::-1]), found)
    close(found, oracle(experts, 1), 1e-6)


def test_untrained_expert_adds_nothing(tmp_path) -> None:
    expert = random_blocks(0)
    zero = {name: 0 * A for name, A in expert.items()}
    found = merged(tmp_path, [expert, zero])
    close(found, oracle([expert], BLOCK // 4))


def test_equalise_brings_the_experts_to_one_norm(tmp_path) -> None:
    """p = 1: the norm over the whole model is the experts' mean; p = 0: as they are."""
    one, two = random_blocks(0, 0.02), random_blocks(1, 0.1)
    norms = [np.sqrt(sum((A**2).sum() for A in e.values())) for e in (one, two)]
    for p in (0.0, 0.4, 1.0):
        scaled = [
            {name: (np.mean(norms) / norm) ** p * A for name, A in e.items()}
            for e, norm in zip((one, two), norms, strict=True)
        ]
        close(merged(tmp_path / str(p), [one, two], equalise=p), oracle(scaled, BLOCK // 4), 5e-7)


@pytest.mark.parametrize("neumann", [False, True])
def test_result_loads_in_peft_and_is_what_the_merge_says(tmp_path, neumann) -> None:
    experts = [random_blocks(seed, 0.03) for seed in range(2)]
    folders = [write(tmp_path / f"a{at}", e, neumann) for at, e in enumerate(experts)]
    merge(folders, method="lie-tsv", output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_cayley_neumann"] is neumann
    model = peft.PeftModel.from_pretrained(Net(), tmp_path / "out").merge_and_unload()
    base = Net().state_dict()
    for name, blocks in oracle(experts, BLOCK // 4).items():
        eye = np.eye(BLOCK)
        R = [np.linalg.solve(eye - A, eye + A) for A in blocks]
        W = base[f"{name}.weight"].double().numpy().reshape(-1, len(R), BLOCK)
        wanted = np.stack([W[:, at] @ R[at] for at in range(len(R))], 1).reshape(len(W), -1)
        found = model.state_dict()[f"{name}.weight"].numpy()
        # the Neumann series is not quite the Cayley transform
        np.testing.assert_allclose(found, wanted, atol=4e-3 if neumann else 2e-6)


def test_full_checkpoint_is_the_adapter_applied(tmp_path) -> None:
    experts = [random_blocks(seed) for seed in range(2)]
    folders = [write(tmp_path / f"a{at}", e) for at, e in enumerate(experts)]
    merge(folders, method="lie-tsv", output=tmp_path / "out")
    full = merge(folders, method="lie-tsv", base=dict(Net().state_dict())).tensors
    model = peft.PeftModel.from_pretrained(Net(), tmp_path / "out").merge_and_unload()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(full[name], value, rtol=0, atol=2e-6)
