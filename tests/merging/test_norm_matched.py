"""One strength for every method: how far a merge ends up from its base, and in which direction."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orthomerge import merge, plan
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.errors import NumericalError, RecipeError
from orthomerge.merging.engine import Interrupted
from orthomerge.merging.executors import EXECUTORS

METHODS = {
    "task-arithmetic": {},
    "task-arithmetic-weighted": {"method": "task-arithmetic", "weights": [1.0, -0.5, 2.0]},
    "ties": {"density": 0.3},
    "ties-model": {"method": "ties", "density": 0.3, "scope": "model"},
    "tsv-m": {},
    "orthomerge-decoupled": {},
    "faithful": {"method": "orthomerge-decoupled", "mode": "faithful"},
    "nested-survey": {
        "method": "orthomerge-decoupled",
        "gate": "off",
        "residual": {"method": "ties", "scope": "model"},
    },
    "linear": {},
    "linear-sum": {"method": "linear", "normalize": False},
    "geodesic": {},
    "geodesic-turned": {"method": "geodesic", "gate": "off"},
}
SHAPES = {
    "embed_tokens.weight": (20, 8),
    "layers.0.up.weight": (16, 8),
    "layers.0.down.weight": (8, 16),
    "layers.0.norm.weight": (8,),
    "layers.0.mlp.experts.up_proj": (2, 6, 5),
    "position_ids": (4,),
}


def model(seed: int, base=None, spread: float = 0.05, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        start = 0.0 if base is None else base[name].double()
        out[name] = (start + (1.0 if base is None else spread) * noise).to(dtype)
    out["position_ids"] = torch.arange(4)
    return out


BASE = model(0)
EXPERTS = [model(seed, BASE, 0.02 * seed) for seed in (1, 2, 3)]


def flat(tensors, base=BASE) -> torch.Tensor:
    """All changes, end to end."""
    names = [name for name in SHAPES if name != "position_ids"]
    return torch.cat([(tensors[n].double() - base[n].double()).reshape(-1) for n in names])


def run(choice, **settings):
    given = {"base": BASE, "method": choice, **METHODS.get(choice, {}), **settings}
    return merge(EXPERTS, **given)


SUM = float(sum(flat(e) for e in EXPERTS).norm())


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("choice", METHODS)
def test_the_update_is_as_large_as_asked_and_points_the_same_way(choice, strength) -> None:
    plain = flat(run(choice).tensors)
    result = run(choice, norm_matched=strength)
    found = flat(result.tensors)
    assert float(found.norm()) == pytest.approx(strength * SUM, rel=1e-9)
    torch.testing.assert_close(found / found.norm(), plain / plain.norm(), atol=1e-12, rtol=0)
    assert torch.equal(result.tensors["position_ids"], torch.arange(4))
    assert abs(float(plain.norm()) / SUM - strength) > 1e-6 or choice.startswith("task-arith")


def test_the_plain_sum_at_one_is_itself() -> None:
    found = run("task-arithmetic", norm_matched=1.0).tensors
    torch.testing.assert_close(
        flat(found), flat(run("task-arithmetic").tensors), atol=1e-14, rtol=0
    )


def test_slerp_is_scaled_too() -> None:
    pair = EXPERTS[:2]
    plain = flat(merge(pair, base=BASE, method="slerp", t=0.3).tensors)
    found = flat(merge(pair, base=BASE, method="slerp", t=0.3, norm_matched=0.7).tensors)
    size = 0.7 * float((flat(pair[0]) + flat(pair[1])).norm())
    torch.testing.assert_close(found, plain * size / plain.norm(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_one_model_passed_through_is_scaled_too(scale) -> None:
    settings = {"base": BASE, "method": "passthrough", "scale": scale}
    plain = flat(merge(EXPERTS[:1], **settings).tensors)
    found = flat(merge(EXPERTS[:1], **settings, norm_matched=0.5).tensors)
    size = 0.5 * float(flat(EXPERTS[0]).norm())
    torch.testing.assert_close(found, plain * size / plain.norm(), atol=1e-12, rtol=0)


def test_half_precision_models() -> None:
    """The norms are those of the unrounded update; rounding is the output's own."""
    base = model(0, dtype=torch.bfloat16)
    experts = [model(seed, base, 0.3, torch.bfloat16) for seed in (1, 2)]
    total = float(sum(flat(e, base) for e in experts).norm())
    found = merge(experts, base=base, method="ties", norm_matched=0.6)
    assert float(flat(found.tensors, base).norm()) == pytest.approx(0.6 * total, rel=5e-3)
    wider = merge(
        experts,
        base=base,
        method="ties",
        norm_matched=0.6,
        output_settings={"dtype": "float32"},
    )
    assert float(flat(wider.tensors, base).norm()) == pytest.approx(0.6 * total, rel=1e-5)


def test_models_that_did_not_change_are_the_base() -> None:
    found = merge([BASE, BASE], base=BASE, method="ties", norm_matched=2.0).tensors
    assert all(torch.equal(found[name], BASE[name]) for name in BASE)


def test_an_update_of_zero_cannot_be_scaled() -> None:
    with pytest.raises(NumericalError, match="update is zero"):
        run("task-arithmetic", scale=0.0, norm_matched=1.0)


def test_what_is_refused() -> None:
    with pytest.raises(RecipeError, match="relative to the base"):
        plan(EXPERTS, method="linear", norm_matched=1.0)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(RecipeError, match="norm_matched"):
            plan(EXPERTS, base=BASE, method="ties", norm_matched=wrong)


# On disk.


@pytest.fixture
def sources(write_folder):
    config = {"architectures": ["X"]}
    base = write_folder("base", BASE, config=config)
    return base, [
        write_folder(f"m{at}", e, shards=3, config=config) for at, e in enumerate(EXPERTS)
    ]


def read(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    checkpoint.close()
    return tensors


@pytest.mark.parametrize("choice", ["ties-model", "nested-survey", "geodesic-turned"])
def test_shards_threads_and_resuming_do_not_change_it(
    choice, sources, tmp_path, monkeypatch
) -> None:
    base, models = sources
    settings = {"base": base, "method": choice, **METHODS[choice], "norm_matched": 0.8}
    wanted = run(choice, norm_matched=0.8).tensors
    merge(
        models,
        output=tmp_path / "one",
        output_settings={"max_shard_size": 2000},
        run_settings={"workers": 3},
        **settings,
    )
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    done = 0

    def interrupt(original):
        def work(task, context):
            nonlocal done
            if not context.measuring:
                done += 1
                if done > 2:
                    raise KeyboardInterrupt
            return original(task, context)

        return work

    with monkeypatch.context() as patch:
        for kind in ("merge", "whole"):
            patch.setitem(EXECUTORS, kind, interrupt(EXECUTORS[kind]))
        with pytest.raises(Interrupted):
            merge(models, output=tmp_path / "two", run_settings={"workers": 1}, **settings)
    result = merge(models, output=tmp_path / "two", resume=True, **settings)
    assert result.resumed_tensors >= 2
    for folder in ("one", "two"):
        found = read(tmp_path / folder)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-14, rtol=0)


def test_another_strength_is_another_merge(sources, tmp_path, monkeypatch) -> None:
    """What an interrupted run of one strength left is not resumed with another."""
    from orthomerge.errors import ResumeError

    base, models = sources

    def stop(task, context):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(EXECUTORS, "copy", stop)
        with pytest.raises(Interrupted):
            merge(models, base=base, method="ties", norm_matched=0.8, output=tmp_path / "out")
    with pytest.raises(ResumeError):
        merge(
            models, base=base, method="ties", norm_matched=0.9, output=tmp_path / "out", resume=True
        )


# OFT adapters: the same on their generators.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)


def oft(folder: Path, seed: int, **options) -> Path:
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(
        target_modules=["up", "down"], oft_block_size=8, use_cayley_neumann=False, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(Net(), config).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    noise = {k: torch.randn(v.shape, generator=generator) for k, v in load_file(path).items()}
    save_file({k: 0.05 * seed * v for k, v in noise.items()}, path)
    return folder


def generators(tensors) -> torch.Tensor:
    return torch.cat([v.double().reshape(-1) for k, v in sorted(tensors.items()) if "oft" in k])


@pytest.mark.parametrize("method", ["orthomerge", "lie-tsv"])
def test_adapters_are_scaled_in_their_generators(method, tmp_path) -> None:
    adapters = [oft(tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    stored = [generators(load_file(a / "adapter_model.safetensors")) for a in adapters]
    plain = generators(merge(adapters, method=method).tensors)
    found = generators(merge(adapters, method=method, norm_matched=0.6).tensors)
    assert float(found.norm()) == pytest.approx(0.6 * float(sum(stored).norm()), rel=1e-6)
    torch.testing.assert_close(found / found.norm(), plain / plain.norm(), atol=1e-6, rtol=0)
    base = dict(Net().state_dict())
    full = merge(adapters, method=method, base=base, norm_matched=0.6).tensors
    merge(adapters, method=method, norm_matched=0.6, output=tmp_path / "out")
    again = merge([tmp_path / "out"], method="orthomerge", base=base).tensors
    for name, value in again.items():
        torch.testing.assert_close(full[name], value, atol=2e-6, rtol=0)


def test_trained_heads_of_adapters_are_averaged_as_without_a_strength(tmp_path) -> None:
    adapters = [oft(tmp_path / str(seed), seed, modules_to_save=["head"]) for seed in (1, 2)]
    plain = merge(adapters, method="orthomerge").tensors
    found = merge(adapters, method="orthomerge", norm_matched=0.6).tensors
    for name, value in plain.items():
        assert torch.equal(found[name], value) == ("oft" not in name), name
    base = dict(Net().state_dict())
    full = merge(adapters, method="orthomerge", base=base, norm_matched=0.6).tensors
    (head,) = (value for name, value in plain.items() if name.endswith("head.weight"))
    assert torch.equal(full["head.weight"], head)
