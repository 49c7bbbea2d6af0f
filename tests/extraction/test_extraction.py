"""Full fine-tunes as adapters: known updates are found, measured, written, and loaded by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import orthomerge
from orthomerge.errors import (
    AdapterError,
    BudgetError,
    NumericalError,
    OrthoMergeError,
    OutputError,
    ProblemsError,
    RecipeError,
)
from orthomerge.extraction import extract, negate

ROWS, N, BLOCK = 48, 64, 8


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(n: int, b: int, size: float, seed: int) -> np.ndarray:
    """A block rotation by scipy's exponential, not by the library's Cayley map."""
    from scipy.linalg import block_diag, expm

    random = np.random.RandomState(seed)
    skews = [random.standard_normal((b, b)) for _ in range(n // b)]
    return np.asarray(block_diag(*[expm(size * (S - S.T)) for S in skews]))


def turned(W: torch.Tensor, R: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(W.double().numpy() @ R).float()


def low(o: int, n: int, rank: int, size: float, seed: int) -> torch.Tensor:
    return size * normal(o, rank, seed=seed) @ normal(rank, n, seed=seed + 1)


@pytest.fixture
def pair() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base, and a fine-tune: a rotated, a low-rank, a mixed and an equal layer; a norm."""
    R = rotation(N, BLOCK, 0.05, 1)
    base = {f"body.{name}.weight": normal(ROWS, N, seed=i) for i, name in enumerate("abcd")}
    base |= {"norm.weight": torch.ones(N), "embed_tokens.weight": normal(9, N), "b.bias": normal(3)}
    model = dict(base)
    model["body.a.weight"] = turned(base["body.a.weight"], R)
    model["body.b.weight"] = base["body.b.weight"] + low(ROWS, N, 3, 0.2, 5)
    model["body.c.weight"] = turned(base["body.c.weight"], R) + low(ROWS, N, 2, 0.2, 7)
    model["norm.weight"] = 2 * base["norm.weight"]
    model["embed_tokens.weight"] = base["embed_tokens.weight"] + 1
    return model, base


def by_name(result: Any) -> dict[str, Any]:
    return {layer.name.split(".")[1]: layer for layer in result.layers}


def test_a_rotation_is_found_with_its_angles(pair) -> None:
    model, base = pair
    found = by_name(extract(model, base, kind="oft", block_size=BLOCK, anchor=0.0))["a"]
    R = rotation(N, BLOCK, 0.05, 1)
    largest = np.degrees(np.abs(np.angle(np.linalg.eigvals(R))).max())
    assert found.rotation_share == pytest.approx(1, abs=1e-9)
    assert found.residual < 1e-5
    assert found.largest_angle == pytest.approx(largest, rel=1e-4)
    assert found.low_rank_share == found.rank == 0
    # What a rotation of these blocks explains of noise: a fraction (b - 1)/2 or b/2 per row.
    assert found.rotation_by_chance == pytest.approx(BLOCK / (2 * ROWS))


def test_the_default_anchor_costs_little(pair) -> None:
    found = by_name(extract(*pair, kind="oft", block_size=BLOCK))["a"]
    assert found.rotation_share > 0.9999


def test_a_low_rank_update_is_found_at_its_rank(pair) -> None:
    result = extract(*pair, kind="lora", rank=16)
    found = by_name(result)["b"]
    assert found.rank == 3
    assert found.residual < 1e-5
    assert found.low_rank_share == pytest.approx(1, abs=1e-9)
    tensors, config = result.adapters["lora"]
    assert tensors["base_model.model.body.b.lora_B.weight"].shape == (ROWS, 3)
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_energy_takes_the_smallest_rank_that_keeps_it() -> None:
    U, V = (np.linalg.qr(normal(40, 6, seed=s).double().numpy())[0] for s in (1, 2))
    s = np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])
    D = torch.from_numpy((U * s) @ V.T).float()
    shares = np.cumsum(s**2) / (s**2).sum()
    base = {"a.weight": torch.zeros(40, 40)}
    for r in range(1, 6):
        for share in (shares[r - 1] - 1e-3, (shares[r - 1] + shares[max(r - 2, 0)]) / 2):
            found = extract({"a.weight": D}, base, kind="lora", rank=None, energy=float(share))
            expected = int(np.argmax(shares >= share)) + 1
            assert found.layers[0].rank == expected
    capped = extract({"a.weight": D}, base, kind="lora", rank=2, energy=0.999)
    assert capped.layers[0].rank == 2


def written(folder: Path, name: str, W0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return W0 R and B A from the files: unpack, (I - A)^{-1}(I + A), multiply, in fp64."""
    oft = load_file(folder / "oft" / "adapter_model.safetensors")
    lora = load_file(folder / "lora" / "adapter_model.safetensors")
    R = np.zeros((N, N))
    for k, row in enumerate(oft[f"base_model.model.body.{name}.oft_R.weight"].double().numpy()):
        Q = np.zeros((BLOCK, BLOCK))
        Q[np.triu_indices(BLOCK, 1)] = row
        Q -= Q.T
        at = slice(k * BLOCK, (k + 1) * BLOCK)
        R[at, at] = np.linalg.solve(np.eye(BLOCK) - Q, np.eye(BLOCK) + Q)
    keys = [f"base_model.model.body.{name}.lora_{factor}.weight" for factor in "BA"]
    B, A = (lora[key].double().numpy() for key in keys)
    return W0 @ R, B @ A


def test_shares_add_up_and_are_those_of_the_written_numbers(pair, tmp_path) -> None:
    model, base = pair
    result = extract(model, base, block_size=BLOCK, rank=2, output=tmp_path / "out")
    for name, layer in by_name(result).items():
        W0 = base[f"body.{name}.weight"].double().numpy()
        W1 = model[f"body.{name}.weight"].double().numpy()
        rotated, BA = written(tmp_path / "out", name, W0)
        total = ((W1 - W0) ** 2).sum()
        assert layer.rotation_share == pytest.approx(
            1 - ((W1 - rotated) ** 2).sum() / total, abs=1e-6
        )
        left = ((W1 - rotated - BA) ** 2).sum() / total
        assert layer.residual**2 == pytest.approx(left, abs=1e-6)
        shares = layer.rotation_share + layer.low_rank_share + layer.residual**2
        assert shares == pytest.approx(1, abs=1e-9)
        assert layer.change == pytest.approx(np.sqrt(total / (W0**2).sum()), rel=1e-5)
    assert by_name(result)["c"].explained > 0.9
    assert [v.explained for v in result.layers] == sorted(v.explained for v in result.layers)
    energies = [v.change_norm**2 for v in result.layers]
    explained = np.average([v.explained for v in result.layers], weights=energies)
    assert result.totals["explained"] == pytest.approx(explained)


def test_what_no_adapter_has_is_listed(pair) -> None:
    result = extract(*pair, kind="lora")
    assert {one.name for one in result.unexplained} == {"norm.weight", "embed_tokens.weight"}
    assert result.unchanged == ("body.d.weight",)
    tensors, config = result.adapters["lora"]
    assert not any("body.d" in name for name in tensors)
    assert config["target_modules"] == ["body.a", "body.b", "body.c"]


def test_targets_choose_layers(pair) -> None:
    result = extract(*pair, kind="lora", targets=["*.b", "body.c.weight"])
    assert set(by_name(result)) == {"b", "c"}
    assert "body.a.weight" in {one.name for one in result.unexplained}


def test_the_seed_is_the_name(pair) -> None:
    first, second = (extract(*pair).adapters["lora"][0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [1, 512])
def test_large_matrices_meet_the_optimal_error(size: int) -> None:
    """Sketched, not decomposed: the error stays within 0.1 % of the best one."""
    base = {"a.weight": torch.zeros(600, 700)}
    spectrum = torch.arange(1.0, 701.0) ** (-0.7 if size == 1 else 0)
    D = normal(600, 700, seed=3) * spectrum
    found = extract({"a.weight": D}, base, kind="lora", rank=16).layers[0]
    s = np.linalg.svd(D.double().numpy(), compute_uv=False)
    best = np.sqrt((s[16:] ** 2).sum() / (s**2).sum())
    assert best <= found.residual * (1 + 1e-6) <= 1.001 * best


def test_task_arithmetic_puts_both_parts_back(pair, tmp_path) -> None:
    """Two changes of one base: W0 + (W0 R - W0) + B A is W0 R + B A."""
    model, base = pair
    save_file(base, tmp_path / "base.safetensors")
    extract(model, base, block_size=BLOCK, rank=16, output=tmp_path / "out")
    merged = orthomerge.merge(
        [tmp_path / "out" / "oft", tmp_path / "out" / "lora"],
        base=tmp_path / "base.safetensors",
        method="task-arithmetic",
        weights=[1.0, 1.0],
        scale=1.0,
    ).tensors
    for name in "abc":
        weight = f"body.{name}.weight"
        rotated, BA = written(tmp_path / "out", name, base[weight].double().numpy())
        np.testing.assert_allclose(merged[weight].numpy(), rotated + BA, atol=2e-6, rtol=0)
        assert np.abs(rotated - base[weight].numpy()).max() > 1e-2
    assert torch.equal(merged["body.d.weight"], base["body.d.weight"])


def failing(kind: type[OrthoMergeError], words: str, /, **options: Any) -> Any:
    return pytest.param(kind, words, options, id=words)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        failing(RecipeError, "kind of adapter", kind="loha"),
        failing(RecipeError, "rank must be", rank=0),
        failing(RecipeError, "rank, an energy", rank=None),
        failing(RecipeError, "share in", energy=1.5),
        failing(RecipeError, "at least 2 columns", block_size=1),
        failing(RecipeError, "anchor must be", anchor=-1.0),
        failing(RecipeError, "no linear weight of the base matches", targets="*.q"),
        failing(RecipeError, "no linear weight of the base matches", targets="embed_tokens"),
        failing(BudgetError, "more working memory", memory_budget_bytes=1000),
    ],
)
def test_bad_settings_are_refused(pair, tmp_path, error, words, options) -> None:
    with pytest.raises(error, match=words):
        extract(*pair, output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_all_problems_are_reported_at_once(pair) -> None:
    model, base = pair
    with pytest.raises(ProblemsError, match="3 problems"):
        extract(model, base, rank=0, anchor=-1.0, block_size=0)
    model = {**model, "body.a.weight": torch.zeros(2, 2)}
    del model["body.b.weight"]
    with pytest.raises(ProblemsError, match="2 problems"):
        extract(model, base)


def test_equal_models_and_bad_numbers_leave_nothing(pair, tmp_path) -> None:
    model, base = pair
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(base, base, output=out)
    bad = {**model, "body.c.weight": model["body.c.weight"].clone()}
    bad["body.c.weight"][3, 4] = float("nan")
    with pytest.raises(NumericalError, match=r"body\.c\.weight"):
        extract(bad, base, output=out)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(pair, tmp_path, monkeypatch) -> None:
    import orthomerge.checkpoints.bundle as bundle

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "fsync_write", stop)
    with pytest.raises(KeyboardInterrupt):
        extract(*pair, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_replaced_only_on_request(pair, tmp_path) -> None:
    out = tmp_path / "out"
    extract(*pair, output=out)
    with pytest.raises(OutputError, match="already exists"):
        extract(*pair, output=out)
    extract(*pair, kind="lora", output=out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "orthomerge.json",
    }
    extract(*pair, output=out, overwrite=True)
    (out / "mine").mkdir()
    with pytest.raises(OutputError, match="holds other folders"):
        extract(*pair, output=out, overwrite=True)


def test_blocks_follow_the_columns_as_in_peft(tmp_path) -> None:
    base = {"a.weight": normal(20, 60), "b.weight": normal(20, 64)}
    model = {name: W + 0.01 * normal(*W.shape, seed=4) for name, W in base.items()}
    result = extract(model, base, kind="oft", block_size=32)
    assert {v.name: v.block_size for v in result.layers} == {"a.weight": 30, "b.weight": 32}
    assert "blocks of 30" in result.notes[0]
    assert result.adapters["oft"][1]["oft_block_size"] == 32


def test_conv1d_layers_are_stored_the_other_way_round(write_folder, tmp_path) -> None:
    base = {"h.c_fc.weight": normal(12, 20)}
    model = {"h.c_fc.weight": base["h.c_fc.weight"] + low(12, 20, 2, 0.3, 3)}
    folders = [write_folder(n, t, config={"model_type": "gpt2"}) for n, t in
               (("m", model), ("b", base))]  # fmt: skip
    with pytest.raises(AdapterError, match="Conv1D"):
        extract(*folders, kind="oft")
    tensors, config = extract(*folders, kind="lora").adapters["lora"]
    assert config["fan_in_fan_out"] is True
    B, A = (tensors[f"base_model.model.h.c_fc.lora_{f}.weight"] for f in "BA")
    assert B.shape == (20, 2)
    change = model["h.c_fc.weight"] - base["h.c_fc.weight"]
    torch.testing.assert_close((B @ A).T, change, atol=1e-5, rtol=0)


def test_adapters_are_no_input_and_full_models_no_adapter(pair, tmp_path) -> None:
    extract(*pair, kind="lora", output=tmp_path / "lora")
    with pytest.raises(AdapterError, match="only full checkpoints"):
        extract(tmp_path / "lora", pair[1])
    save_file(pair[1], tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match="only adapters can be negated"):
        negate(tmp_path / "base.safetensors", tmp_path / "out")


@pytest.mark.parametrize("kind", ["oft", "lora"])
def test_an_adapter_after_its_negation_gives_the_base(pair, tmp_path, kind) -> None:
    model, base = pair
    save_file(base, tmp_path / "base.safetensors")
    extract(model, base, kind=kind, block_size=BLOCK, output=tmp_path / "there")
    result = negate(tmp_path / "there", tmp_path / "back")
    assert result.output == tmp_path / "back"

    def applied(adapter: Path, to: Path) -> Path:
        out = adapter.with_suffix(".safetensors")
        orthomerge.merge([adapter], base=to, output=out, method="task-arithmetic", scale=1.0)
        return out

    there = applied(tmp_path / "there", tmp_path / "base.safetensors")
    back = load_file(applied(tmp_path / "back", there))
    for name, W in base.items():
        torch.testing.assert_close(back[name], W, atol=2e-5, rtol=0)
    moved = load_file(there)["body.a.weight"] - base["body.a.weight"]
    assert float(moved.abs().max()) > 0.1
    record = json.loads((tmp_path / "back" / "orthomerge.json").read_text())
    assert record["command"] == "negate"


def test_a_device_that_is_not_there_is_refused(tmp_path) -> None:
    import torch

    from orthomerge.errors import BudgetError
    from orthomerge.extraction import extract

    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    base = {"a.weight": torch.zeros(4, 4)}
    with pytest.raises(BudgetError, match="no such device"):
        extract({"a.weight": torch.ones(4, 4)}, base, device="cuda", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
