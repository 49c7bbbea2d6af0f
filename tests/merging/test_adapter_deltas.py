"""Adapters and full checkpoints in one merge: an adapter is the change it makes to its base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orthomerge import merge, plan
from orthomerge.checkpoints.sources import open_checkpoint

peft = pytest.importorskip("peft")

TARGETS = ["up", "down"]
CHANGED = {"body.up.weight", "body.down.weight"}


class Net(nn.Module):
    """Adapted layers, one that nothing adapts, a norm and a head that may be trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 16)
        self.body = nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)})
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)


def make(folder: Path, kind: str, seed: int, model: nn.Module | None = None, **options) -> Path:
    """Let PEFT write an adapter with random parameters."""
    if kind == "lora":
        config = peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 6, **options})
    else:
        config = peft.OFTConfig(
            **{"target_modules": TARGETS, "oft_block_size": 8, "use_cayley_neumann": False},
            **options,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model or Net(), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    scale = 0.1 if "oft" in name else 0.3
                    parameter.add_(scale * torch.randn_like(parameter))
        wrapped.save_pretrained(folder)
    return folder


def by_peft(folder: Path, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model or Net(), folder)
        return {k: v.double() for k, v in loaded.merge_and_unload().state_dict().items()}


def full_model(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (W + 0.05 * torch.randn(W.shape, generator=generator)).to(dtype)
        for name, W in Net().state_dict().items()
    }


def base_of(dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) for name, value in Net().state_dict().items()}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return make(tmp_path / "lora", "lora", 1)


@pytest.fixture
def oft(tmp_path: Path) -> Path:
    return make(tmp_path / "oft", "oft", 2)


def close(found, wanted, tolerance=2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wanted[name], atol=tolerance, rtol=0, msg=name)


def test_task_arithmetic_of_all_kinds_is_the_sum_of_their_changes(lora, oft) -> None:
    base, full = base_of(), full_model(3)
    weights = [0.5, 2.0, -0.25]
    found = merge(
        [lora, oft, full], base=base, method="task-arithmetic", weights=weights, scale=0.8
    ).tensors
    W0 = {k: v.double() for k, v in base.items()}
    experts = [by_peft(lora), by_peft(oft), {k: v.double() for k, v in full.items()}]
    wanted = {
        k: W0[k] + 0.8 * sum(w * (e[k] - W0[k]) for w, e in zip(weights, experts, strict=True))
        for k in W0
    }
    close(found, wanted)


def lora_changes(folder: Path) -> dict[str, torch.Tensor]:
    stored = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    out = {}
    for name in CHANGED:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        out[name] = 6 / 4 * stored[f"{key}B.weight"] @ stored[f"{key}A.weight"]
    return out


def test_no_change_is_rounded_to_the_base_before_it_is_merged(lora, tmp_path) -> None:
    """A base in bfloat16 and an output in float32 that carries the changes exactly."""
    other = make(tmp_path / "other", "lora", 5)
    base = base_of(torch.bfloat16)
    settings = {"base": base, "output_settings": {"dtype": "float32"}}
    found = merge([lora, other], method="task-arithmetic", scale=0.01, **settings).tensors
    one, two = lora_changes(lora), lora_changes(other)
    for name in CHANGED:
        W0 = base[name].double()
        wanted = W0 + 0.01 * (one[name] + two[name])
        torch.testing.assert_close(found[name].double(), wanted, atol=5e-8, rtol=2e-7)
        # had each expert been rounded to bfloat16 first, this would be off by far more
        rounded = [(W0 + D[name]).bfloat16().double() - W0 for D in (one, two)]
        assert float((W0 + 0.01 * sum(rounded) - wanted).abs().max()) > 1e-5


@pytest.mark.parametrize("method", ["linear", "geodesic"])
def test_methods_of_weights_see_base_plus_change(lora, oft, method) -> None:
    base = base_of()
    wanted = merge(
        [{k: v.float() for k, v in by_peft(a).items()} for a in (lora, oft)],
        method=method,
        weights=[1.0, 3.0],
    ).tensors
    found = merge([lora, oft], base=base, method=method, weights=[1.0, 3.0]).tensors
    close(found, {k: v.double() for k, v in wanted.items()}, 1e-5)


def test_linear_over_adapters_is_exact_in_fp32_over_a_bf16_base(lora) -> None:
    base = base_of(torch.bfloat16)
    found = merge(
        [lora, base], base=base, method="linear", output_settings={"dtype": "float32"}
    ).tensors
    for name, D in lora_changes(lora).items():
        wanted = base[name].double() + D / 2
        torch.testing.assert_close(found[name].double(), wanted, atol=1e-7, rtol=2e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ties", "density": 0.3},
        {"method": "ties", "density": 0.3, "scope": "model"},
        {"method": "tsv-m"},
        {"method": "orthomerge-decoupled", "gate": "off"},
        {"method": "orthomerge-decoupled", "mode": "faithful", "residual": "ties"},
        {"method": "task-arithmetic", "norm_matched": 0.7},
    ],
    ids=str,
)
def test_adapters_merge_like_the_full_models_they_stand_for(lora, oft, settings) -> None:
    """In fp64, so that the full models are the adapters' changes and not a rounding of them.

    What no adapter touches is left out of the model-wide count, so the full models carry only
    what the adapters change."""
    base = {k: v.double() for k, v in base_of().items()}
    adapters = merge([lora, oft], base=base, **settings).tensors
    each = [merge([a], base=base, method="task-arithmetic").tensors for a in (lora, oft)]
    only = [{k: e[k] for k in CHANGED} for e in each]
    full = merge(only, base={k: base[k] for k in CHANGED}, **settings).tensors
    for name in CHANGED:
        torch.testing.assert_close(adapters[name], full[name], atol=1e-11, rtol=0)
    for a, e in zip((lora, oft), each, strict=True):
        close(e, by_peft(a), 2e-6)


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_one_adapter_passed_through_is_its_merge_into_the_base(kind, lora, oft) -> None:
    folder = {"lora": lora, "oft": oft}[kind]
    found = merge([folder], base=base_of(), method="passthrough").tensors
    close(found, by_peft(folder))


def test_whole_tensors_of_adapters_are_full_weights(lora, tmp_path) -> None:
    """modules_to_save replace a weight; whoever does not save it has the base's."""
    headed = make(tmp_path / "headed", "lora", 4, modules_to_save=["head"])
    base = base_of()
    found = merge([lora, headed], base=base, method="task-arithmetic").tensors
    one, two = by_peft(lora), by_peft(headed)
    wanted = {k: one[k] + two[k] - base[k].double() for k in base}
    close(found, wanted)
    assert not torch.allclose(found["head.weight"], base["head.weight"])
    average = merge([lora, headed], base=base, method="linear").tensors
    close(average, {k: (one[k] + two[k]) / 2 for k in base})


# On disk.


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    odd = base_of(torch.bfloat16)
    odd["norm.weight"] = odd["norm.weight"].float()
    odd["body.up.bias"][0] = -0.0
    save_file(odd, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["Net"]}))
    return folder


def raw(folder: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(folder)
    found = {
        name: checkpoint.read(name).clone().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name in checkpoint.tensors
    }
    checkpoint.close()
    return found


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "tsv-m", "linear"])
def test_what_no_adapter_touches_is_the_bases_byte_for_byte(
    method, lora, oft, base_folder, tmp_path
) -> None:
    merge([lora, oft], base=base_folder, method=method, output=tmp_path / "out")
    before, after = raw(base_folder), raw(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == CHANGED
    kinds = {t.name: t.kind for t in plan([lora, oft], base=base_folder, method=method).tasks}
    assert {name for name, kind in kinds.items() if kind == "copy"} == before.keys() - CHANGED


def provenance(folder: Path) -> dict:
    (path,) = (p for p in folder.glob("*.json") if "merge" in p.name or "provenance" in p.name)
    return json.loads(path.read_text())


def test_provenance_knows_the_adapters_by_their_tensors(lora, oft, base_folder, tmp_path) -> None:
    settings = {"base": base_folder, "method": "task-arithmetic"}
    result = merge([lora, oft], output=tmp_path / "out", **settings)
    base, one, two = result.details["body.up.weight"]["digests"]
    assert [name for name, _ in base] == ["body.up.weight"]
    key = "base_model.model.body.up."
    assert {name for name, _ in one} == {f"{key}lora_A.weight", f"{key}lora_B.weight"}
    assert {name for name, _ in two} == {f"{key}oft_R.weight"}
    before = [s["digest"] for s in provenance(tmp_path / "out")["sources"]]
    assert all(before)
    path = lora / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{key}lora_A.weight"][0, 0] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    merge([lora, oft], output=tmp_path / "again", **settings)
    after = [s["digest"] for s in provenance(tmp_path / "again")["sources"]]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_broken_adapters_are_named(lora, oft) -> None:
    from orthomerge.errors import NumericalError

    path = lora / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NumericalError) as caught:
        merge([lora, oft], base=base_of(), method="ties")
    assert name.rpartition(".lora_")[0] in str(caught.value)
    assert "lora" in (caught.value.file or "")


def test_adapters_without_their_base_are_refused(lora, oft) -> None:
    with pytest.raises(Exception, match="--base"):
        plan([lora, oft], method="linear")
