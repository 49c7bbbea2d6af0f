"""What a run writes: it loads, it is what the table says, and it holds no row's text."""

from __future__ import annotations

import json
import math
import re
import stat

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import FORGET, HOLDOUT, RETAIN
from unlearn_runs import leftovers, request, run, timeless

from orthomerge.quiet import quiet_libraries
from orthomerge.unlearning.training import estimate, prepare_sets
from orthomerge.unlearning.training.sessions import Session

KINDS = {
    "lora": {"train__learning_rate": 2e-3},
    "oft": {"adapter__block_size": 8, "train__learning_rate": 1e-2},
    "full": {"train__learning_rate": 5e-4},
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, facts, tmp_path_factory):
    """(kind, output folder, result) of one run per kind of training."""
    kind = request.param
    from unlearn_runs import request as asked

    output = tmp_path_factory.mktemp(kind) / "out"
    result = run(asked(facts, output, adapter__kind=kind, **KINDS[kind]))
    return kind, output, result


def loaded(kind, output, facts):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        if kind == "full":
            return AutoModelForCausalLM.from_pretrained(output)
        base = AutoModelForCausalLM.from_pretrained(facts / "model")
        return PeftModel.from_pretrained(base, output)


def losses(model, tokenizer, rows):
    """Loss per token of every answer, from the definition: one row at a time, no padding."""
    found = []
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer:"
        ids = tokenizer(f"{prompt} {row['answer']}", add_special_tokens=False)["input_ids"]
        skipped = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logs = model.eval()(input_ids=ids).logits.double().log_softmax(-1)
        picked = [-logs[0, t - 1, ids[0, t]].item() for t in range(skipped, ids.shape[1])]
        found.append(sum(picked) / len(picked))
    return torch.tensor(found, dtype=torch.float64)


def test_what_was_written_has_the_losses_of_the_table(made, facts):
    from transformers import AutoTokenizer

    kind, output, result = made
    tokenizer = AutoTokenizer.from_pretrained(output if kind == "full" else facts / "model")
    start = loaded("full", facts / "model", facts)
    end = loaded(kind, output, facts)
    table = json.loads((output / "unlearning.json").read_text())["table"]
    assert [row["name"] for row in table] == ["forget", "retain", "holdout"]
    assert table == [row.as_dict() for row in result.table]
    for told, rows in zip(table, (FORGET, RETAIN, HOLDOUT), strict=True):
        before, after = losses(start, tokenizer, rows), losses(end, tokenizer, rows)
        assert told["rows"] == len(rows)
        assert told["loss_before"] == pytest.approx(before.mean().item(), rel=1e-4)
        assert told["loss_after"] == pytest.approx(after.mean().item(), rel=1e-4)
        assert told["probability_after"] == pytest.approx((-after).exp().mean().item(), rel=1e-4)
    assert table[0]["loss_after"] > table[0]["loss_before"] + 0.01


def test_files_are_those_of_an_adapter_or_of_a_whole_model(made, facts):
    kind, output, _ = made
    own = {"orthomerge.json", "unlearning.json", "unlearning_steps.jsonl"}
    names = leftovers(output)
    if kind == "full":
        assert names >= own | {"config.json", "model.safetensors", "tokenizer.json"}
        before, after = (json.loads((f / "config.json").read_text())
                         for f in (facts / "model", output))  # fmt: skip
        assert before.pop("use_cache") == after.pop("use_cache")
        assert before == after
    else:
        assert names == own | {"adapter_config.json", "adapter_model.safetensors"}
        config = json.loads((output / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(facts / "model")
        assert config["target_modules"] == sorted(config["target_modules"])
    modes = {stat.S_IMODE((output / name).stat().st_mode) for name in names}
    assert len(modes) == 1


def test_the_record_has_recipe_and_fingerprints_and_nothing_has_a_rows_text(made):
    _, output, result = made
    record = json.loads((output / "orthomerge.json").read_text())
    assert record["command"] == "unlearn"
    assert record["recipe"]["objective"] == "npo"
    assert record["recipe"]["train"]["max_steps"] == 4
    assert set(record["sets"]) == {"forget", "retain", "check", "holdout"}
    assert all(re.fullmatch(r"blake3:[0-9a-f]{64}", digest) for digest in record["sets"].values())
    secrets = {row["answer"].strip(".") for row in [*FORGET, *RETAIN]} | {"Where does", "Which pet"}
    for path in output.iterdir():
        if path.suffix == ".safetensors" or path.name.startswith("tokenizer"):
            continue
        text = path.read_text()
        assert [s for s in secrets if s in text] == [], path.name
    steps = timeless((output / "unlearning_steps.jsonl").read_text())
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [step["projection"]["window"] for step in steps] == [0, 1, 2, 3]
    assert result.steps == 4


def test_only_what_is_trained_differs(made, facts):
    kind, output, _ = made
    if kind == "full":
        before = load_file(facts / "model" / "model.safetensors")
        after = load_file(output / "model.safetensors")
        assert set(before) == set(after)
        assert all(before[n].shape == after[n].shape for n in before)
        assert any(not before[n].equal(after[n]) for n in before)
    else:
        tensors = load_file(output / "adapter_model.safetensors")
        assert all(torch.isfinite(t).all() for t in tensors.values())
        assert any(t.abs().max() > 0 for t in tensors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_counts_what_is_really_there(kind, facts, tmp_path):
    asked = request(facts, tmp_path / "out", adapter__kind=kind, **KINDS[kind])
    sets = prepare_sets(asked)
    found = estimate(asked, sets)
    model = Session(asked, sets).model
    parameters = list(model.parameters())
    assert found.parameters == sum(p.numel() for p in parameters)
    assert found.trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert found.model_bytes == sum(p.numel() * p.element_size() for p in parameters)
    assert found.steps == 4
    told = found.as_dict()
    assert told["peak_bytes"] == found.peak_bytes > found.model_bytes
    assert all(math.isfinite(number) for number in told.values())


def test_a_session_measures_the_holdouts_level(facts, tmp_path):
    """Mean and deviation over rows, of the losses per token."""
    from transformers import AutoTokenizer

    asked = request(facts, tmp_path / "out", stop__level="auto", projection="off")
    session = Session(asked, prepare_sets(asked))
    level = session.level(session.measure_all())
    expected = losses(
        loaded("full", facts / "model", facts),
        AutoTokenizer.from_pretrained(facts / "model"), HOLDOUT,
    )  # fmt: skip
    assert level.source == "holdout"
    assert level.loss == pytest.approx(expected.mean().item(), rel=1e-4)
    assert level.deviation == pytest.approx(expected.std().item(), rel=1e-4)
