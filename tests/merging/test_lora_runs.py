"""Runs of LoRA merges: batches, threads, resuming, ranks from data, verification, strength."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from lora_adapters import (
    MODULES,
    dense_changes,
    read_changes,
    state,
    write_adapter,
    write_base,
)

import orthomerge
from orthomerge.checkpoints.writer import StreamingWriter
from orthomerge.errors import BudgetError, RecipeError, VerificationError
from orthomerge.merging import batching, engine
from orthomerge.merging.executors.context import Interrupted

METHODS = ("do-merging", "task-arithmetic", "ties", "dare")


@pytest.fixture
def folders(tmp_path):
    return [write_adapter(tmp_path / f"a{rank}", rank, rank) for rank in (2, 3)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_threads_do_not_change_the_result(method, monkeypatch) -> None:
    adapters = [state(seed, rank) for seed, rank in ((1, 2), (2, 3), (3, 2))]
    sizes = []
    original = engine.run_tasks
    monkeypatch.setattr(engine, "run_tasks", lambda b, c: sizes.append(len(b)) or original(b, c))
    together = orthomerge.merge(adapters, method=method, run_settings={"workers": 1})
    assert (max(sizes) > 1) == (method in ("do-merging", "task-arithmetic"))
    monkeypatch.setattr(batching, "_CPU_BYTES", 1)
    alone = orthomerge.merge(adapters, method=method, run_settings={"workers": 3})
    for name, values in together.tensors.items():
        torch.testing.assert_close(alone.tensors[name], values, rtol=1e-5, atol=1e-6)
    assert together.facts.keys() == alone.facts.keys()


def test_facts_of_a_batch_belong_to_their_modules() -> None:
    adapters = [state(seed, 2) for seed in (1, 2)]
    facts = orthomerge.merge(adapters, method="do-merging").facts
    first, second = (dense_changes(adapter) for adapter in adapters)
    for name in MODULES:
        norms = sorted(torch.linalg.matrix_norm(one[name]).item() for one in (first, second))
        found = facts[f"base_model.model.{name}.lora_A.weight"]["imbalance"]
        assert found == pytest.approx(norms[1] / norms[0], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"rank": "energy:0.8"}], ids=["lossless", "energy"])
def test_an_interrupted_merge_resumes_to_the_same_bytes(
    settings, folders, tmp_path, monkeypatch
) -> None:
    arguments = {"method": "ties", "output_settings": settings, "run_settings": {"workers": 1}}
    whole = orthomerge.merge(folders, output=tmp_path / "whole", **arguments).output
    original, calls = engine.run_tasks, []

    def stop_later(batch, context):
        if not context.measuring:
            calls.append(batch)
            if len(calls) == 4:
                raise Interrupted
        return original(batch, context)

    monkeypatch.setattr(engine, "run_tasks", stop_later)
    with pytest.raises(Interrupted):
        orthomerge.merge(folders, output=tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts").exists()
    result = orthomerge.merge(folders, output=tmp_path / "parts", resume=True, **arguments)
    assert 6 <= result.resumed_tensors < 2 * len(MODULES)  # at least three modules
    found, wanted = files(result.output), files(whole)
    assert found["adapter_model.safetensors"] == wanted["adapter_model.safetensors"]
    assert found["adapter_config.json"] == wanted["adapter_config.json"]


def test_ranks_from_data_are_those_of_the_dense_truth(folders, tmp_path) -> None:
    output = orthomerge.merge(
        folders, method="sum", output=tmp_path / "out", output_settings={"rank": "energy:0.8"}
    ).output
    adapters = [state(rank, rank) for rank in (2, 3)]
    first, second = (dense_changes(adapter) for adapter in adapters)
    config = json.loads((output / "adapter_config.json").read_text())
    for name, found in read_changes(output).items():
        values = torch.linalg.svdvals(first[name] + second[name])
        shares = values.square().cumsum(0) / values.square().sum()
        rank = int((shares < 0.8).sum()) + 1
        pattern = "^" + name.replace(".", "\\.")
        assert config["rank_pattern"].get(pattern, config["r"]) == rank
        lost = torch.linalg.matrix_norm(first[name] + second[name] - found)
        torch.testing.assert_close(lost, values[rank:].norm(), rtol=1e-4, atol=1e-5)


def test_a_damaged_output_is_not_published(folders, tmp_path, monkeypatch) -> None:
    original = StreamingWriter.write

    def damaged(self, name, start, data):
        changed = bytearray(data)
        if name.endswith("layers.1.up.lora_B.weight"):
            changed[3] ^= 0x01  # an exponent bit of the first float32
        original(self, name, start, memoryview(changed))

    monkeypatch.setattr(StreamingWriter, "write", damaged)
    with pytest.raises(VerificationError, match=r"layers\.1\.up.*Nothing was published"):
        orthomerge.merge(folders, method="sum", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_few_bits_do_not_hide_a_small_damage(folders, tmp_path, monkeypatch, dtype, form) -> None:
    """One per cent, of one tensor: what is read back is compared after rounding, not before."""
    base = write_base(tmp_path / "base")
    original, half = StreamingWriter.write, getattr(torch, dtype)
    damaged_name = "layers.1.up.lora_B.weight" if form == "lora" else "layers.1.up.weight"

    def damaged(self, name, start, data):
        if name.endswith(damaged_name):
            values = torch.frombuffer(bytearray(data), dtype=half)
            data = memoryview((values * 1.01).view(torch.uint8).numpy())
        original(self, name, start, data)

    settings = {"base": base, "output_settings": {"dtype": dtype, "form": form}}
    orthomerge.merge(folders, output=tmp_path / "good", **settings)
    monkeypatch.setattr(StreamingWriter, "write", damaged)
    with pytest.raises(VerificationError, match=r"layers\.1\.up"):
        orthomerge.merge(folders, output=tmp_path / "out", **settings)


def test_a_full_checkpoint_is_read_back_as_well(folders, tmp_path, monkeypatch) -> None:
    base = write_base(tmp_path / "base")
    original = StreamingWriter.write

    def damaged(self, name, start, data):
        zero = memoryview(bytes(len(data))) if name == "layers.0.q.weight" else data
        original(self, name, start, zero)

    monkeypatch.setattr(StreamingWriter, "write", damaged)
    with pytest.raises(VerificationError, match=r"layers\.0\.q\.weight"):
        orthomerge.merge(folders, base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["do-merging", "task-arithmetic", "ties"])
def test_a_norm_matched_strength_is_the_same_for_every_method(method) -> None:
    adapters = [state(seed, 2) for seed in (1, 2, 3)]
    merged = orthomerge.merge(adapters, method=method, norm_matched=0.5)
    total = {}
    for adapter in adapters:
        for name, change in dense_changes(adapter).items():
            total[name] = total.get(name, 0) + change
    size = sum(value.square().sum() for value in total.values()) ** 0.5
    found = dense_changes(_unit_scaled(merged.adapter))
    norm = sum(value.square().sum() for value in found.values()) ** 0.5
    torch.testing.assert_close(norm, 0.5 * size, rtol=1e-5, atol=0)


def _unit_scaled(adapter):
    """The merged adapter, whose alpha equals its rank in every module."""
    assert adapter.config["lora_alpha"] == adapter.config["r"]
    return adapter


def test_with_a_base_the_change_is_added_to_it(folders, tmp_path) -> None:
    from safetensors.torch import load_file

    base = write_base(tmp_path / "base")
    full = orthomerge.merge(folders, base=base, output=tmp_path / "full").output
    adapter = orthomerge.merge(folders, output=tmp_path / "adapter").output
    before = load_file(base / "model.safetensors")
    after = load_file(full / "model.safetensors")
    assert torch.equal(after["norm.weight"], before["norm.weight"])
    for name, change in read_changes(adapter).items():
        found = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        torch.testing.assert_close(found, change, rtol=1e-5, atol=1e-5)


def test_a_base_is_not_read_where_only_its_names_matter(folders, tmp_path) -> None:
    base = write_base(tmp_path / "base")
    with_base = orthomerge.merge(
        folders, base=base, output=tmp_path / "with", output_settings={"form": "lora"}
    ).output
    alone = orthomerge.merge(folders, output=tmp_path / "alone").output
    assert (
        files(with_base)["adapter_model.safetensors"] == files(alone)["adapter_model.safetensors"]
    )


def test_the_inputs_digests_are_in_the_provenance(folders, tmp_path) -> None:
    output = orthomerge.merge(folders, method="ties", output=tmp_path / "out").output
    record = json.loads((output / "orthomerge.json").read_text())
    digests = {source["digest"] for source in record["sources"]}
    assert len(digests) == 2
    assert all(digests)


def test_too_small_budgets_are_refused() -> None:
    adapters = [state(seed, 2) for seed in (1, 2)]
    with pytest.raises(BudgetError, match="more working memory"):
        orthomerge.merge(adapters, run_settings={"memory_budget": "1kB"})
    with pytest.raises(RecipeError, match="do not give every module rank 1"):
        orthomerge.merge(adapters, method="sum", output_settings={"rank": "parameters:10"})


def test_threads_share_one_merge() -> None:
    adapters = [state(seed, 2) for seed in (1, 2)]
    wanted = orthomerge.merge(adapters).tensors
    found: list[dict[str, torch.Tensor]] = []
    threads = [
        threading.Thread(target=lambda: found.append(orthomerge.merge(adapters).tensors))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(result[name], wanted[name]) for result in found for name in wanted)


def test_random_masks_do_not_depend_on_how_the_result_is_written(folders, tmp_path) -> None:
    """A module's masks are its own: in an adapter, in another format, and on a base."""
    from safetensors.torch import load_file

    base = write_base(tmp_path / "base")
    arguments = {"method": "knots", "op": {"method": "dare", "density": 0.5}}
    alone = orthomerge.merge(folders, output=tmp_path / "alone", **arguments).output
    full = orthomerge.merge(folders, base=base, output=tmp_path / "full", **arguments).output
    before, after = (load_file(path / "model.safetensors") for path in (base, full))
    for name, change in read_changes(alone).items():
        found = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        torch.testing.assert_close(found, change, rtol=1e-4, atol=1e-4)
