"""Plans: what is refused, all at once, before a tensor is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from orthomerge import merge, plan
from orthomerge.errors import (
    BudgetError,
    OrthoMergeError,
    OutputError,
    ProblemsError,
    RecipeError,
    TensorMismatchError,
)


def sd(seed: int = 0, **changes):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.layers.0.w": torch.randn(4, 6, generator=generator),
        "model.layers.1.w": torch.randn(4, 6, generator=generator),
        "model.norm.weight": torch.randn(6, generator=generator),
    }
    tensors |= changes
    return {name: value for name, value in tensors.items() if value is not None}


def problems_of(*arguments, **settings) -> list[OrthoMergeError]:
    with pytest.raises(OrthoMergeError) as caught:
        plan(*arguments, **settings)
    error = caught.value
    return list(error.problems) if isinstance(error, ProblemsError) else [error]


def test_all_problems_are_reported_at_once() -> None:
    second = sd(1, **{"model.layers.0.w": torch.zeros(4, 7), "model.layers.1.w": None})
    found = problems_of([sd(), second], method="linear", weights=[1.0, -1.0])
    texts = [str(problem) for problem in found]
    assert len(found) == 3
    assert any("shapes differ" in text and "model.layers.0.w" in text for text in texts)
    assert any("is missing" in text and "model.layers.1.w" in text for text in texts)
    assert any("sum to zero" in text and "model.norm.weight" in text for text in texts)


def test_parameters_and_weights_are_checked_together() -> None:
    found = problems_of(
        [sd(), sd(1)], base=sd(2), method="ties", weights=[1.0, "x"], densty=0.1, scale=True
    )
    texts = " | ".join(map(str, found))
    assert "Did you mean 'density'" in texts
    assert "'scale'" in texts
    assert "weight" in texts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "slerp", "weights": [1.0, 2.0]}, "takes no weights"),
        ({"method": "passthrough"}, "exactly"),
        ({"method": "ties"}, "needs the base model"),
        ({"method": "orthomerge"}, "orthomerge-decoupled needs the base model"),
        ({"method": "lie-tsv"}, "tsv-m needs the base model"),
        ({"method": "linear", "missing": "ignore"}, "missing"),
        ({"method": "linear", "output_settings": {"dtype": "int8"}}, "floating-point dtype"),
        ({"method": "linear", "run_settings": {"memory_budget": "2 parsecs"}}, "not a size"),
        ({"method": "linear", "run_settings": {"device": "tpu"}}, "device"),
        ({"method": "linear", "output_settings": {"shard": 1}}, "unknown key 'shard'"),
        ({"method": "linear", "weights": [1.0]}, "one weight per model"),
        ({"method": "linear", "weights": [[{"match": "nope*", "value": 1}], 1.0]}, "no tensor"),
    ],
)
def test_wrong_settings_are_named(settings, words) -> None:
    found = problems_of([sd(), sd(1)], **settings)
    assert any(words in str(problem) for problem in found), found
    assert all(isinstance(problem, RecipeError) for problem in found)


def test_missing_tensor_policies() -> None:
    base, second = sd(2), sd(1, **{"model.norm.weight": None})
    with pytest.raises(TensorMismatchError, match=r"model\.norm\.weight"):
        plan([sd(), second], method="linear")
    copied = merge([sd(), second], method="linear", missing="copy-base").tensors
    assert torch.equal(copied["model.norm.weight"], sd()["model.norm.weight"])
    from_base = merge([sd(), second], base=base, method="ties", missing="copy-base").tensors
    assert torch.equal(from_base["model.norm.weight"], base["model.norm.weight"])
    skipped = merge([sd(), second], method="linear", missing="skip").tensors
    assert "model.norm.weight" not in skipped


def test_extra_tensor_that_the_first_source_lacks_can_only_be_skipped() -> None:
    extra = sd(1, **{"adapter.extra": torch.zeros(2)})
    found = problems_of([sd(), extra], method="linear", missing="copy-base")
    assert "--missing skip" in str(found[0])
    assert "adapter.extra" not in merge([sd(), extra], method="linear", missing="skip").tensors


def test_integer_tensors_are_copied_when_equal_and_refused_when_not() -> None:
    ids = torch.arange(5)
    same = merge([sd(ids=ids), sd(1, ids=ids)], method="linear").tensors
    assert torch.equal(same["ids"], ids)
    with pytest.raises(TensorMismatchError, match="ids"):
        merge([sd(ids=ids), sd(1, ids=ids + 1)], method="linear")


def test_integer_against_float_is_refused_in_the_plan() -> None:
    found = problems_of([sd(x=torch.zeros(2)), sd(1, x=torch.zeros(2).int())], method="linear")
    assert "integer and floating" in str(found[0])


def test_memory_budget_that_no_task_fits_is_refused() -> None:
    found = problems_of([sd(), sd(1)], method="linear", run_settings={"memory_budget": 100})
    assert isinstance(found[0], BudgetError)
    assert "--memory-budget" in str(found[0])


def test_survey_of_the_whole_model_counts_as_working_memory() -> None:
    models = [{f"layers.{i}.w": torch.zeros(1000, 400) for i in range(4)} for _ in range(2)]
    prepared = plan(models, base=models[0], method="ties", scope="model")
    assert prepared.peak_bytes >= prepared.survey_bytes == int(0.05 * 1_600_000) * 4
    assert plan(models, base=models[0], method="ties").survey_bytes == 0


def test_full_disk_is_refused(monkeypatch, tmp_path) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    found = problems_of([sd(), sd(1)], method="linear", output=tmp_path / "out")
    assert "disk space" in str(found[0])


def test_output_over_an_input_is_refused(tmp_path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        save_file(sd(seed), tmp_path / name / "model.safetensors")
    inputs = [tmp_path / "a", tmp_path / "b"]
    for output in (tmp_path / "a", tmp_path, tmp_path / "b" / "out"):
        with pytest.raises(OutputError, match="never overwritten"):
            merge(inputs, method="linear", output=output, overwrite=True)


def test_method_follows_from_the_sources() -> None:
    assert plan([sd(), sd(1)]).method.name == "geodesic"
    assert plan([sd(), sd(1)], base=sd(2)).method.name == "orthomerge-decoupled"


@pytest.mark.parametrize(
    ("stored", "asked", "wanted"),
    [
        (torch.bfloat16, None, "F32"),
        (torch.float32, None, "F32"),
        (torch.float64, None, "F64"),
        (torch.bfloat16, "float64", "F64"),
    ],
)
def test_compute_dtype_is_fp32_unless_inputs_are_wider(stored, asked, wanted) -> None:
    models = [{k: v.to(stored) for k, v in sd(seed).items()} for seed in (0, 1)]
    settings = {"compute_dtype": asked} if asked else {}
    assert plan(models, run_settings=settings).compute_dtype == wanted


def test_plan_hash_depends_on_what_changes_the_result() -> None:
    one, again = (plan([sd(), sd(1)], weights=[1.0, 2.0]).hash() for _ in range(2))
    other = plan([sd(), sd(1)], weights=[2.0, 1.0]).hash()
    assert one == again != other
    assert plan([sd(), sd(1)], weights=[1.0, 2.0], run_settings={"workers": 1}).hash() == one
    bare = plan([sd(), sd(1)], weights=[1.0, 2.0], output_settings={"provenance": False})
    assert bare.hash() != one, "its journal holds no digests"


def test_source_that_the_method_does_not_look_at_gets_no_digest(tmp_path) -> None:
    merge([sd(), sd(1)], base=sd(2), method="linear", output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "orthomerge.json").read_text())
    assert [bool(source["digest"]) for source in record["sources"]] == [False, True, True]


def test_output_without_a_name_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "not a name" in str(problems_of([sd(), sd(1)], output=".")[0])


def test_rules_and_gradients_reach_the_tensors() -> None:
    models = [{k: torch.full_like(v, c) for k, v in sd().items()} for c in (0.0, 1.0)]
    rules = [{"match": "*norm*", "value": 3.0}, {"value": [0.0, 1.0]}]
    found = merge(models, method="linear", weights=[1.0, rules])
    assert found.tensors["model.norm.weight"][0].item() == 0.75
    assert found.tensors["model.layers.0.w"][0, 0].item() == 0.0
    assert found.tensors["model.layers.1.w"][0, 0].item() == 0.5


def test_model_scope_needs_one_value_everywhere() -> None:
    rules = [{"match": "*norm*", "value": 0.5}, {"value": 0.2}]
    found = problems_of([sd(), sd(1)], base=sd(2), method="ties", scope="model", density=rules)
    assert "scope" in str(found[0])


def tied_folder(path, tie: bool, head: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(9, 4, generator=generator)}
    if head:
        tensors["lm_head.weight"] = (
            tensors["model.embed_tokens.weight"].clone()
            if tie
            else torch.randn(9, 4, generator=generator)
        )
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": tie}))
    return path


def test_tied_head_is_merged_once_and_left_out(tmp_path) -> None:
    one = tied_folder(tmp_path / "one", True, True, 1)
    two = tied_folder(tmp_path / "two", True, False, 2)
    result = merge([one, two], method="linear")
    assert set(result.tensors) == {"model.embed_tokens.weight"}
    assert any("tied" in note for note in result.plan.notes)


def test_untied_output_takes_the_embedding_of_tied_models(tmp_path) -> None:
    untied = tied_folder(tmp_path / "untied", False, True, 1)
    tied = tied_folder(tmp_path / "tied", True, False, 2)
    result = merge([untied, tied], method="linear").tensors
    from safetensors.torch import load_file

    first, second = (load_file(p / "model.safetensors") for p in (untied, tied))
    wanted = (first["lm_head.weight"] + second["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(result["lm_head.weight"], wanted)


def test_untied_model_does_not_fit_a_tied_output(tmp_path) -> None:
    tied = tied_folder(tmp_path / "tied", True, False, 2)
    untied = tied_folder(tmp_path / "untied", False, True, 1)
    assert "output head of its own" in str(problems_of([tied, untied])[0])
