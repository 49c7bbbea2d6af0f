"""``orthomerge diff`` of LoRA adapters: their changes are compared, not the factors they are in."""

from __future__ import annotations

import json
import math

import pytest
import torch
from orthomerge_cli.main import app
from orthomerge_cli.session import run_guarded
from safetensors.torch import save_file

from orthomerge.adapters.memory import AdapterState
from orthomerge.adapters.sources import open_source
from orthomerge.diagnostics import diff_sources

KEY = "base_model.model.{}.lora_{}"
MODULES = {"layers.0.q": (12, 20), "layers.1.q": (9, 7)}


def factors(seed, rank=4):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {name: (normal(o, rank), normal(rank, n)) for name, (o, n) in MODULES.items()}


def rotated(made):
    """The same changes in other factors, ``B Q`` and ``Qᵀ A``."""
    found = {}
    for name, (B, A) in made.items():
        start = torch.randn(len(A), len(A), generator=torch.Generator().manual_seed(len(B)))
        Q = torch.linalg.qr(start.double())[0]
        found[name] = B @ Q, Q.mT @ A
    return found


def state(made, name="mine", *, dtype=torch.float64, alpha=8.0, more=(), **config):
    tensors = {KEY.format(name, "B.weight"): B.to(dtype) for name, (B, _) in made.items()}
    tensors |= {KEY.format(name, "A.weight"): A.to(dtype) for name, (_, A) in made.items()}
    rank = len(next(iter(made.values()))[1])
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **config}
    return AdapterState({**tensors, **dict(more)}, settings, name)


def compared(first, second):
    return {d.name: d for d in diff_sources(open_source(first), open_source(second))}


def write(folder, made):
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in made.tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(made.config))
    return str(folder)


def test_other_factors_of_the_same_changes_are_no_difference(tmp_path, capfd) -> None:
    first = write(tmp_path / "a", state(factors(1)))
    second = write(tmp_path / "b", state(rotated(factors(1))))
    assert run_guarded(app, ["diff", first, second, "--fail-above", "0"]) == 0
    assert "0 of 2 modules differ" in capfd.readouterr().out
    assert run_guarded(app, ["diff", first, second, "--fail-above", "0", "--tensors"]) == 7
    assert "4 of 4 tensors differ" in capfd.readouterr().out
    third = write(tmp_path / "c", state(factors(2)))
    assert run_guarded(app, ["diff", first, third, "--fail-above", "0.1"]) == 7
    assert "2 modules differ by more than 0.1" in capfd.readouterr().err


def test_what_the_stored_dtype_rounds_is_told_from_a_change() -> None:
    first = state(factors(1), dtype=torch.float32)
    found = compared(first, state(rotated(factors(1)), dtype=torch.float32))
    for module in MODULES:
        assert 0 < found[module].relative < 1e-6
        assert found[module].note == "no more than F32 rounds"
    nudged = {name: (B * (1 + 1e-4), A) for name, (B, A) in factors(1).items()}
    for found in compared(first, state(nudged, dtype=torch.float32)).values():
        assert found.relative == pytest.approx(1e-4, rel=1e-2)
        assert not found.note


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-10])
def test_numbers_are_those_of_the_dense_changes(size) -> None:
    """Also of differences that a Gram matrix would not resolve; scales and ranks differ."""
    one, more = factors(1), factors(2, rank=2)
    both = {
        name: (torch.cat([B, size * more[name][0]], 1), torch.cat([A, more[name][1]], 0))
        for name, (B, A) in one.items()
    }
    # 8 / 4 = 2 √6 / √6: both scales are 2, so that only what was added differs.
    second = state(both, alpha=2 * math.sqrt(6), use_rslora=True)
    for name, found in compared(state(one), second).items():
        X, added = one[name][0] @ one[name][1], size * more[name][0] @ more[name][1]
        Y = X + added
        assert found.relative == pytest.approx(float(added.norm() / X.norm()), rel=1e-4)
        cosine = float((X * Y).sum() / X.norm() / Y.norm())
        assert found.cosine == pytest.approx(cosine, abs=1e-12)
        assert (found.status, found.largest) == ("changed", None)
        assert found.note == "rank 4 and 6"


def test_everything_else_of_an_adapter_is_compared_too() -> None:
    head = "base_model.model.score.weight"
    whole = {"modules_to_save": ["score"], "lora_bias": True}
    bias = {KEY.format(name, "B.bias"): torch.ones(o) for name, (o, _) in MODULES.items()}
    first = state(factors(1), alpha=8.0, more={**bias, head: torch.ones(2, 3)}, **whole)
    half = {key: value / 2 for key, value in bias.items()}
    doubled = {name: (B / 2, A) for name, (B, A) in factors(1).items()}
    second = state(doubled, alpha=16.0, more={**half, head: torch.ones(2, 3)}, **whole)
    assert {d.status for d in compared(first, second).values()} == {"equal"}
    second.tensors[head] *= 3
    second.tensors[KEY.format("layers.1.q", "B.bias")] *= 2
    changed = {n: d.relative for n, d in compared(first, second).items() if d.status != "equal"}
    assert changed == {head: pytest.approx(2.0), "layers.1.q.bias": pytest.approx(1.0)}


def test_magnitudes_count() -> None:
    def dora(size):
        keys = {name: KEY.format(name, "magnitude_vector") for name in MODULES}
        more = {keys[name]: torch.full((o,), size) for name, (o, _) in MODULES.items()}
        return state(factors(1), more=more, use_dora=True)

    found = compared(dora(1.0), dora(1.5))
    assert {name: d.status for name, d in found.items()} == {
        **{f"{name}.magnitude": "changed" for name in MODULES},
        **dict.fromkeys(MODULES, "equal"),
    }
    assert found["layers.0.q.magnitude"].relative == pytest.approx(0.5)
    plain = compared(dora(1.0), state(factors(1)))
    assert plain["layers.0.q.magnitude"].status == "only-first"


def test_modules_that_cannot_be_compared_come_first() -> None:
    first, second = factors(1), factors(2)
    first["layers.2.q"], second["layers.3.q"] = first["layers.0.q"], second["layers.0.q"]
    second["layers.1.q"] = torch.ones(9, 4).double(), torch.ones(4, 8).double()
    second["layers.0.q"][0][0, 0] = math.nan
    found = compared(state(first), state(second))
    assert [(d.name, d.status) for d in found.values()] == [
        ("layers.1.q", "shape"),
        ("layers.2.q", "only-first"),
        ("layers.3.q", "only-second"),
        ("layers.0.q", "changed"),
    ]
    assert found["layers.1.q"].note == "[9, 7] and [9, 8]"
    assert math.isnan(found["layers.0.q"].relative)
