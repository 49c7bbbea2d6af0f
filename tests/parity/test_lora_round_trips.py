"""Adapters of every kind, merged into an adapter that PEFT loads: the logits of the dense truth."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from small_models import bert, convolutions, gpt2, llama, logits

import orthomerge

Weights = dict[str, torch.Tensor]
ATTENTION = ["q_proj", "v_proj", "down_proj"]
DENSE = ["query", "value", "intermediate.dense"]
PATTERNS = {
    "rank_pattern": {r"0\.mlp\.down_proj": 2, "v_proj": 5},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "v_proj": 1},
}
Kind = tuple[Callable[[], nn.Module], dict[str, Any]]
KINDS: dict[str, Kind] = {
    "plain": (llama, {"target_modules": ATTENTION}),
    "rslora": (llama, {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (llama, {"target_modules": ATTENTION, **PATTERNS}),
    "rslora-patterns": (llama, {"target_modules": ATTENTION, "use_rslora": True, **PATTERNS}),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "saved": (llama, {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "transposed": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv": (convolutions, {"target_modules": ["first", "point"]}),
    "conv-and-head": (
        convolutions,
        {"target_modules": ["first", "point"], "modules_to_save": ["head"]},
    ),
    "classifier": (bert, {"target_modules": DENSE, "task_type": "SEQ_CLS"}),
    "lora-bias": (bert, {"target_modules": DENSE, "task_type": "SEQ_CLS", "lora_bias": True}),
    "biases": (bert, {"target_modules": DENSE, "bias": "all"}),
    "own-biases": (bert, {"target_modules": DENSE, "bias": "lora_only"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(folder: Path, kind: str, seed: int, dtype: torch.dtype = torch.float64, **more: Any):
    """Let PEFT write an adapter with random numbers; return the weights PEFT merges it into."""
    model, settings = KINDS[kind]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings, **more})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model().to(dtype), config, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data += (0.2 * noise).to(dtype)
        adapted.save_pretrained(folder)
        return dict(adapted.merge_and_unload().state_dict())


def loaded_logits(folder: Path, model: Callable[[], nn.Module]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        found = peft.PeftModel.from_pretrained(model(), folder, autocast_adapter_dtype=False)
        return logits(found.eval())


def truth(kind: str, merged: Sequence[Weights], weights: Sequence[float]) -> torch.Tensor:
    """Logits of ``W_0 + Σ w_i (W_i - W_0)``; what is saved whole is averaged instead."""
    model, settings = KINDS[kind][0](), KINDS[kind][1]
    saved = tuple(settings.get("modules_to_save", ()))
    saved += ("classifier",) if settings.get("task_type") else ()
    biases = settings.get("bias", "none") != "none"
    for name, W in model.state_dict().items():
        whole = name.rpartition(".")[0].endswith(saved) or (biases and name.endswith("bias"))
        total = sum(weights) if whole else 1.0
        change = sum(w * (W1[name].to(W) - W) for w, W1 in zip(weights, merged, strict=True))
        W += change / total
    return logits(model)


@every_kind
def test_one_adapter_passes_through(tmp_path: Path, kind: str) -> None:
    merged = make(tmp_path / "a", kind, 1)
    model = KINDS[kind][0]
    orthomerge.merge([tmp_path / "a"], method="passthrough", output=tmp_path / "out")
    wanted = truth(kind, [merged], [1.0])
    assert float((wanted - logits(model())).abs().max()) > 1e-5
    theirs = loaded_logits(tmp_path / "a", model)
    torch.testing.assert_close(theirs, wanted, atol=1e-11, rtol=0)
    found = loaded_logits(tmp_path / "out", model)
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("kind", "rank"),
    [*((kind, None) for kind in KINDS), *((kind, 10) for kind in ("patterns", "conv"))],
)
def test_a_sum_of_two_has_the_dense_logits(tmp_path: Path, kind: str, rank: int | None) -> None:
    """Ranks up to 5 and 5: a limit of 10 takes nothing away."""
    model, weights = KINDS[kind][0], [0.7, -0.4]
    merged = [make(tmp_path / "a", kind, 1), make(tmp_path / "b", kind, 2, r=3, lora_alpha=2)]
    orthomerge.merge(
        [tmp_path / "a", tmp_path / "b"],
        method="task-arithmetic",
        weights=weights,
        output=tmp_path / "out",
        output_settings={"rank": rank},
    )
    wanted = truth(kind, merged, weights)
    alone = [truth(kind, [one], [1.0]) for one in merged]
    assert min(float((wanted - one).abs().max()) for one in alone) > 1e-5
    found = loaded_logits(tmp_path / "out", model)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "lora-bias", "transposed", "embedding", "conv"])
def test_the_mean_in_single_precision(tmp_path: Path, kind: str) -> None:
    """float32 adapters: the dense fp64 logits to the precision of float32."""
    merged = [make(tmp_path / name, kind, seed, torch.float32) for seed, name in enumerate("ab")]
    folders = [tmp_path / name for name in "ab"]
    orthomerge.merge(folders, method="linear", weights=[1.0, 3.0], output=tmp_path / "out")
    wanted = truth(kind, merged, [0.25, 0.75])
    found = loaded_logits(tmp_path / "out", KINDS[kind][0])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
