"""DoRA adapters merged into full weights and into a DoRA adapter, against PEFT's own models."""

from __future__ import annotations

import pytest
import torch

import orthomerge

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from small_models import llama, logits  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def folders(tmp_path):
    """A base, a DoRA adapter and a plain LoRA adapter of it."""
    llama().save_pretrained(tmp_path / "base")
    for at, name in enumerate(["dora", "lora"]):
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=name == "dora")
        model = peft.get_peft_model(llama(), config)
        torch.manual_seed(20 + at)
        for key, parameter in model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                parameter.data = 0.1 * torch.randn_like(parameter)
            if "magnitude" in key:
                parameter.data = parameter.data * (1 + 0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
    return tmp_path


def full_weights(folder):
    return peft.PeftModel.from_pretrained(llama(), folder).merge_and_unload().state_dict()


def summed(folders, weights=(1.0, 0.5)):
    """W_0 + Σ w_i (W_i - W_0), of the two adapters as PEFT merges each."""
    base = llama().state_dict()
    models = [full_weights(folders / name) for name in ("dora", "lora")]
    pairs = [*zip(weights, models, strict=True)]
    return {n: W0 + sum(w * (m[n] - W0) for w, m in pairs) for n, W0 in base.items()}


@pytest.mark.parametrize("form", ["full", "dora"])
def test_the_sum_of_a_dora_and_a_lora_is_pefts(folders, form) -> None:
    output = orthomerge.merge(
        [folders / "dora", folders / "lora"],
        base=folders / "base",
        method="task-arithmetic",
        weights=[1.0, 0.5],
        output=folders / "out",
        output_settings={"form": form},
    ).output
    wanted = llama()
    wanted.load_state_dict(summed(folders))
    if form == "full":
        found = type(wanted).from_pretrained(output, dtype=torch.float64).eval()
    else:
        found = peft.PeftModel.from_pretrained(llama(), output).eval()
        assert found.peft_config["default"].use_dora
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-6, atol=1e-8)


def test_both_forms_of_do_merging_agree(folders) -> None:
    adapters = [folders / "dora", folders / "lora"]
    for form in ("full", "dora"):
        orthomerge.merge(
            adapters,
            base=folders / "base",
            output=folders / f"as-{form}",
            output_settings={"form": form},
        )
    found = full_weights(folders / "as-dora")
    model = type(llama()).from_pretrained(folders / "as-full", dtype=torch.float64)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-8)
