"""``merge_lora`` on a loaded PEFT model's adapters, against sums of their dense changes."""

from __future__ import annotations

import pytest
import torch

import orthomerge
from orthomerge.adapters import adapter_states, load_adapter_state
from orthomerge.errors import AdapterError, OrthoMergeError, RecipeError, UnknownNameError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    settings = {"first": (4, ["q_proj", "v_proj"]), "second": (8, ["q_proj", "down_proj"])}
    for name, (rank, targets) in settings.items():
        lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=targets)
        base = base if isinstance(base, peft.PeftModel) else peft.get_peft_model(base, lora, name)
        if name not in base.peft_config:
            base.add_adapter(name, lora)
    for key, parameter in base.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    return base


def changes(model, name: str) -> dict[str, torch.Tensor]:
    """Each module's dense change by one adapter, in fp64."""
    found = {}
    for path, module in model.named_modules():
        if name in getattr(module, "lora_A", {}):
            B, A = module.lora_B[name].weight.double(), module.lora_A[name].weight.double()
            found[path] = (module.scaling[name] * B @ A).detach()
    return found


def test_the_merged_adapter_joins_the_model(model) -> None:
    result = orthomerge.merge_lora(model, into="sum", method="task-arithmetic", weights=[1.0, -0.5])
    first, second, merged = (changes(model, name) for name in ("first", "second", "sum"))
    assert merged.keys() == first.keys() | second.keys()
    for path, change in merged.items():
        wanted = first.get(path, 0.0) - 0.5 * second.get(path, torch.zeros(1))
        torch.testing.assert_close(change, wanted, atol=1e-7, rtol=1e-6)
    assert model.active_adapter == "first"
    assert result.adapter.config["peft_type"] == "LORA"


def test_names_choose_and_order_the_adapters(model) -> None:
    orthomerge.merge_lora(
        model, names=["second", "first"], into="weighted", method="sum", weights=[2.0, 0.0]
    )
    wanted, found = changes(model, "second"), changes(model, "weighted")
    for path, change in wanted.items():
        torch.testing.assert_close(found[path], 2 * change, atol=1e-7, rtol=1e-6)


def test_the_default_method_keeps_one_adapter_as_it_is(model) -> None:
    orthomerge.merge_lora(model, names=["first"], into="copy")
    for path, change in changes(model, "first").items():
        torch.testing.assert_close(changes(model, "copy")[path], change, atol=1e-7, rtol=1e-5)


def test_nothing_is_added_where_something_is_wrong(model) -> None:
    with pytest.raises(AdapterError, match="an adapter 'first' already"):
        orthomerge.merge_lora(model, into="first", method="sum")
    with pytest.raises(UnknownNameError, match="third"):
        orthomerge.merge_lora(model, names=["third"], into="merged")
    with pytest.raises(RecipeError, match="either written or added"):
        orthomerge.merge_lora(model, into="merged", output="somewhere")
    with pytest.raises(RecipeError, match="loaded PEFT model"):
        orthomerge.merge_lora(["a", "b"], into="merged")
    with pytest.raises(OrthoMergeError, match="needs the base"):
        orthomerge.merge_lora(model, into="merged", form="full")
    assert set(model.peft_config) == {"first", "second"}


@pytest.mark.parametrize("name", ["x.y", "", "keys"])
def test_names_that_peft_cannot_add_are_refused_before_the_merge(model, name, monkeypatch) -> None:
    monkeypatch.setattr("orthomerge.recipe.lora.merge", lambda *_, **__: pytest.fail("merged"))
    with pytest.raises(RecipeError, match="PEFT cannot add an adapter of this name"):
        orthomerge.merge_lora(model, into=name)
    with pytest.raises(RecipeError, match="PEFT cannot add an adapter of this name"):
        load_adapter_state(model, adapter_states(model, ["first"])[0], name)
    assert set(model.peft_config) == {"first", "second"}
