"""Random numbers belong to entries: no piece, thread, shard, place or outer method changes them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from orthomerge import merge
from orthomerge.merging import registry
from orthomerge.merging.draws import Draws, model_keys
from orthomerge.merging.nesting import run_nested
from orthomerge.merging.planning import draft
from orthomerge.merging.registry import Merged, get_method, merge_method
from orthomerge.merging.spaces import Space

DRAWS = Draws(7, "noise", "layers.0.up.weight", ["code#0", "maths#0"])
WHOLE = DRAWS.uniform(1, torch.empty(5000))


def philox(key: int, counter: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., 2011), one block, in Python's integers."""
    mask = (1 << 64) - 1
    c = [counter & mask, counter >> 64 & mask, 0, 0]
    k = [key & mask, key >> 64]
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [second >> 64 ^ c[1] ^ k[0], second & mask, first >> 64 ^ c[3] ^ k[1], first & mask]
        k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
    return c


def test_the_numbers_are_philox_under_a_hash_of_the_address() -> None:
    """Pins them: a change here would change every seeded merge that was ever made."""
    address = json.dumps([7, "noise", "layers.0.up.weight", "maths#0"]).encode()
    key = int.from_bytes(hashlib.blake2b(address, digest_size=16).digest(), "little")
    words = []
    for block in range(1, 4):  # numpy counts before it generates
        for word in philox(key, block):
            words += [word & 0xFFFFFFFF, word >> 32]
    assert WHOLE[: len(words)].tolist() == [(word >> 8) / 2**24 for word in words]


@given(st.integers(0, 4900), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_a_piece_has_the_numbers_of_its_entries(start, count) -> None:
    assert torch.equal(DRAWS.at(start).uniform(1, torch.empty(count)), WHOLE[start : start + count])
    assert torch.equal(DRAWS.uniform(1, torch.empty(count), start), WHOLE[start : start + count])


def test_shape_and_dtype_do_not_matter() -> None:
    found = DRAWS.uniform(1, torch.empty(50, 100, dtype=torch.float64))
    assert found.dtype == torch.float32
    assert torch.equal(found.reshape(-1), WHOLE)


@pytest.mark.parametrize(
    "other",
    [
        Draws(8, DRAWS.method, DRAWS.tensor, DRAWS.models),
        DRAWS.by("dare"),
        Draws(7, DRAWS.method, "layers.1.up.weight", DRAWS.models),
        Draws(7, DRAWS.method, DRAWS.tensor, ["maths#0", "maths#1"]),
        DRAWS.at(1),
    ],
    ids=["seed", "method", "tensor", "model", "place"],
)
def test_every_part_of_the_address_matters(other) -> None:
    found = other.uniform(1, torch.empty(5000))
    assert (found == WHOLE).double().mean() < 0.01
    assert abs(np.corrcoef(found, WHOLE)[0, 1]) < 0.06  # 4 standard deviations


def test_the_numbers_are_uniform() -> None:
    numbers = Draws(0, "m", "w", ["a"]).uniform(0, torch.empty(1 << 18)).double()
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts = torch.histc(numbers, 64, 0, 1)
    expected = len(numbers) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5
    neighbours = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]
    assert abs(neighbours) < 4 / len(numbers) ** 0.5


def test_models_are_told_apart_by_name_then_by_order() -> None:
    assert model_keys(["/x/code", "y/maths/", "hf://org/code"]) == ("code#0", "maths#0", "code#1")
    assert model_keys(["state dict"] * 2) == ("state dict#0", "state dict#1")


@pytest.fixture
def noise(monkeypatch):
    """Two methods that give back their numbers: on pieces and on whole tensors."""
    registry.all_methods()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    def drawn(base, deltas, *, draws, scale: float = 1.0):
        """Return the numbers themselves.

        Args:
            scale: Nothing.
        """
        return Merged(base + sum(draws.uniform(at, base) * 2**at for at in range(len(deltas))))

    for name, whole in [("noise", False), ("whole-noise", True)]:
        merge_method(name, space=Space.DELTA, reference="test", whole=whole)(drawn)


def drawn_by(method: str, **settings):
    base = {
        name: torch.zeros(size) for name, size in [("a", (301, 7)), ("b", (50,)), ("c", (9, 9))]
    }
    return merge([base, base], base=base, method=method, **settings).tensors


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("piece", [1, 13, 64, 1 << 18])
@pytest.mark.parametrize("workers", [1, 3])
def test_pieces_and_threads_do_not_matter(piece, workers, monkeypatch) -> None:
    wanted = drawn_by("noise")
    monkeypatch.setattr(draft, "_CPU_PIECE", piece)
    found = drawn_by("noise", run_settings={"workers": workers})
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(wanted["b"][:9], wanted["c"][0])


@pytest.mark.usefixtures("noise")
def test_whole_tensors_have_the_numbers_that_draws_promises() -> None:
    found = drawn_by("whole-noise", seed=3)
    keys = ["state dict#0", "state dict#1"]
    for name, value in found.items():
        draws = Draws(3, "whole-noise", name, keys)
        assert torch.equal(value, draws.uniform(0, value) + 2 * draws.uniform(1, value))


@pytest.mark.usefixtures("noise")
def test_a_method_inside_another_draws_its_own_numbers() -> None:
    base = torch.zeros(6, 5)
    choice = {"method": "noise", "scale": 1.0}
    found = run_nested(choice, base, [base], weights=[1.0], role="linear", draws=DRAWS)
    assert torch.equal(found, DRAWS.uniform(0, base))


@pytest.mark.usefixtures("noise")
def test_a_method_that_draws_refuses_to_run_without() -> None:
    base = torch.zeros(2)
    with pytest.raises(TypeError, match="noise draws random numbers"):
        get_method("noise").call(base, [base], weights=[1.0])


@pytest.mark.usefixtures("noise")
def test_numbers_follow_a_named_model_to_another_place(tmp_path) -> None:
    for name in ("base", "first", "second"):
        save_file({"w": torch.zeros(40)}, tmp_path / f"{name}.safetensors")

    def merged(*names, method="noise"):
        paths = [str(tmp_path / f"{name}.safetensors") for name in names]
        base = str(tmp_path / "base.safetensors")
        return merge(paths, base=base, method=method).tensors["w"]

    both, swapped = merged("first", "second"), merged("second", "first")
    first, second = merged("first"), merged("second")
    torch.testing.assert_close(both, first + 2 * second, rtol=0, atol=0)
    torch.testing.assert_close(swapped, second + 2 * first, rtol=0, atol=0)
    assert not torch.equal(first, second)
