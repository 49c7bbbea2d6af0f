"""Every way a run fails from the command line: its exit code, its message, and nothing left."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import FORGET, write_rows
from unlearn_runs import leftovers

FAST = ("--projection", "off", "--steps", "2", "--lr", "0.002", "--set", "stop.level=none")


@pytest.fixture
def unlearn(run, facts, tmp_path):
    """Run the command on the facts; ``None`` leaves an option out."""

    def unlearn(*more, code=0, left=(), **options):
        named = {name: facts / f"{name}.jsonl" for name in ("forget", "retain", "holdout")}
        named = {"model": facts / "model", **named, "output": tmp_path / "out", **options}
        given = [part for k, v in named.items() if v is not None for part in (f"--{k}", v)]
        before = leftovers(tmp_path)
        found, out, err = run("unlearn", *given, *more)
        assert found == code, err
        assert "bug" not in err
        if code:
            assert leftovers(tmp_path) - before == set(left)
            assert "Traceback" not in err
        return out + err

    return unlearn


def copied(facts, tmp_path):
    """A copy of the model, to be spoilt."""
    return shutil.copytree(facts / "model", tmp_path / "spoilt")


@pytest.mark.parametrize("name", ["forget", "retain", "holdout"])
def test_missing_file(name, unlearn, tmp_path):
    text = unlearn(code=3, **{name: tmp_path / "nowhere.jsonl"})
    assert "nowhere.jsonl" in text


def test_missing_model(unlearn, tmp_path):
    text = unlearn(code=3, model=tmp_path / "nowhere")
    assert "there is no such model" in text
    assert "Name a folder, or org/name on the hub" in text


def test_model_without_config(unlearn, facts, tmp_path):
    folder = copied(facts, tmp_path)
    (folder / "config.json").unlink()
    assert "it has no config.json" in unlearn(code=3, model=folder)


def test_model_without_tokenizer(unlearn, facts, tmp_path):
    folder = copied(facts, tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "its tokenizer cannot be loaded" in unlearn(code=3, model=folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "config.json: cannot be read"),
        ("[]", "config.json: is no model's configuration"),
        ('{"model_type": "nonsense"}', "cannot be loaded"),
    ],
)
def test_model_with_a_broken_config(content, words, unlearn, facts, tmp_path):
    folder = copied(facts, tmp_path)
    (folder / "config.json").write_text(content)
    assert words in unlearn(*FAST, code=3, model=folder)


def test_model_with_a_missing_tensor_is_not_filled_up_at_random(unlearn, facts, tmp_path):
    folder = copied(facts, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = unlearn(*FAST, code=3, model=folder)
    assert "'model.layers.1.mlp.up_proj.weight': lacks 1 of the tensors" in text


def test_model_with_a_tensor_of_another_shape(unlearn, facts, tmp_path):
    folder = copied(facts, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "cannot be loaded as a causal language model" in unlearn(*FAST, code=3, model=folder)


def test_model_cut_short(unlearn, facts, tmp_path):
    folder = copied(facts, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be loaded as a causal language model" in unlearn(*FAST, code=3, model=folder)


def test_adapter_as_model(unlearn, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    text = unlearn(code=3, model=tmp_path / "adapter")
    assert "is an adapter, and unlearning starts from a whole model" in text
    assert "orthomerge merge ADAPTER --base BASE" in text


def test_empty_set(unlearn, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for name in ("forget", "retain"):
        assert "empty.jsonl" in unlearn(code=3, **{name: empty})


def test_overlap_names_both_places(unlearn, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", FORGET[2:4])
    text = unlearn(code=3, retain=rows)
    assert "rows.jsonl:1" in text
    assert "forget.jsonl:3" in text


def test_several_problems_are_told_together(unlearn, tmp_path):
    text = unlearn(
        code=3, model=tmp_path / "nowhere", forget=tmp_path / "a.jsonl", retain=tmp_path / "b.jsonl"
    )
    assert "3 problems found" in text


def test_rows_of_unknown_form_name_the_keys(unlearn, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"frage": "Wo?", "antwort": "Hier."}])
    text = unlearn(code=3, forget=rows)
    assert "rows.jsonl: its columns are none that are known" in text
    assert "frage" in text


@pytest.mark.parametrize(
    ("line", "place", "words"),
    [
        ("objetive: npo", "2:1", "unknown key 'objetive'. Did you mean 'objective'?"),
        ("objective: nppo", "2:1", "unknown objective 'nppo'. Did you mean 'npo'?"),
        ("parameters: {betta: 1}", "2:14", "Did you mean 'beta'?"),
        ("parameters: {beta: -1}", "2:", "beta"),
        ("train: {max_step: 3}", "2:9", "unknown key 'max_step'. Did you mean 'max_steps'?"),
        ("train: {max_steps: 0}", "2:9", "train.max_steps"),
        ("train: {learning_rate: .nan}", "2:9", "train.learning_rate"),
        ("projection: guu", "2:1", "unknown preset 'guu'. Did you mean 'gu'?"),
        ("projection: {histori: 8}", "2:14", "Did you mean 'history'?"),
        ("projection: {history: many}", "2:14", "projection.history"),
        ("projection: {row_dtype: float31}", "2:14", "projection.row_dtype"),
        ("projection: {restore: .nan}", "2:14", "restore"),
        ("projection: {bank_rows: 0}", "2:14", "bank_rows"),
        ("projection: {refresh_every: 0}", "2:", "refresh_every is out of range"),
        ("projection: {metric: fisher}", "2:", "fisher"),
        ("projection: orthograd", "2:", "extra"),
        ("projection: pcgrad", "2:", "momentum"),
        ("projection: {scope: '('}", "2:", "scope"),
        ("projection: [gu]", "2:1", "projection"),
        ("loss: {retain_loss: none}", "2:", "retain"),
        ("loss: {retain_loss: hidden}", "2:", "hidden"),
        ("objective: pdu", "2:", "tolerance"),
        ("stop: {level: soon}", "2:", "must be auto, none or a loss above 0"),
        ("adapter: {kind: dora}", "2:", "adapter.kind"),
        ("train: {device: tpu}", "2:", "must be auto, cpu, cuda or cuda:N"),
        ("seed: -1", "2:", "seed"),
    ],
)
def test_wrong_recipe(line, place, words, run, facts, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {facts}/model\n{line}\nforget: {facts}/forget.jsonl\n"
        f"retain: {facts}/retain.jsonl\noutput: {tmp_path}/out\n"
    )
    code, _, err = run("unlearn", recipe)
    assert code == 4, err
    assert f"r.yaml:{place}" in err
    assert words in err
    assert leftovers(tmp_path) == {"r.yaml"}
    as_json = json.loads(run("unlearn", recipe, "--json")[1])
    assert as_json["exit_code"] == 4
    assert words.partition(".")[0] in json.dumps(as_json, ensure_ascii=False)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("betta=1", "Did you mean 'beta'?"),
        ("train.max_step=1", "Did you mean 'max_steps'?"),
        ("projection.history=abc", "history"),
        ("nothing", "is not of the form key=value"),
        ("adapter.targets=[nosuch_proj]", "PEFT cannot make the lora adapter"),
        ("projection.scope=nosuch", "nosuch"),
    ],
)
def test_wrong_setting(setting, words, unlearn):
    assert words in unlearn("--set", setting, code=4)


def test_wrong_use(run, facts, tmp_path):
    code, _, err = run("unlearn")
    assert code == 2
    assert "--model, --forget, --retain and --output" in err
    code, _, err = run("unlearn", "--model", facts / "model", "--forget", facts / "forget.jsonl")
    assert code == 4
    assert "the key 'output' is missing" in err
    code, _, err = run("unlearn", "--model", facts / "model", "-o", tmp_path / "out")
    assert code == 4
    assert "the key 'forget' is missing" in err
    code, _, err = run("unlearn", tmp_path / "nowhere.yaml")
    assert code == 4
    assert "nowhere.yaml: cannot be read" in err


def test_no_retain_set_where_one_is_needed(unlearn):
    text = unlearn(code=4, retain=None)
    assert "the objective weighs a retain loss, and there is no retain set" in text
    assert "the projection protects a retain set, and there is none" in text
    unlearn(*FAST, "--set", "loss.retain_weight=0", retain=None)


def test_weights_that_are_not_finite(unlearn, facts, tmp_path):
    folder = copied(facts, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = unlearn(code=5, model=folder)
    assert "row 0 of the forget set a loss that is not finite" in text


def test_a_loss_that_explodes(unlearn):
    text = unlearn(
        "--projection", "off", "--adapter", "full", "--steps", "40", "--lr", "1e30",
        "--set", "stop.level=none", "--set", "stop.evaluate_every=40", code=5,
    )  # fmt: skip
    assert "not finite" in text


def test_nothing_to_forget(unlearn, facts):
    text = unlearn(code=4, forget=facts / "holdout.jsonl", holdout=facts / "forget.jsonl")
    assert "there is nothing to forget" in text
    assert "already at the holdout level" in text


def test_a_rate_so_small_that_nothing_changes(unlearn):
    text = unlearn(*FAST, "--adapter", "full", "--lr", "1e-30", code=5)
    assert "no trained parameter has changed" in text
    assert "Raise train.learning_rate" in text


def test_no_step_that_may_be_kept(unlearn):
    text = unlearn(
        "--projection", "off", "--steps", "3", "--lr", "5", "--set", "stop.max_retain_rise=0.01",
        code=4,
    )  # fmt: skip
    assert "no step could be kept: step 3 raised the retain loss" in text


def test_an_output_that_exists_is_only_replaced_when_asked(unlearn, tmp_path):
    unlearn(*FAST)
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert "the output already exists" in unlearn(*FAST, code=3)
    assert "pass --overwrite to replace it" in unlearn(*FAST, "--dry-run", code=3)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == first
    unlearn(*FAST, "--overwrite", "--seed", "1")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != first
    # An output that could not be replaced is still there.
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    unlearn(*FAST, "--overwrite", "--adapter", "full", "--lr", "1e-30", code=5)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_a_folder_that_is_no_model_is_not_overwritten(unlearn, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "does not look like a model" in unlearn(*FAST, "--overwrite", code=3)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_output_may_not_touch_an_input(unlearn, facts, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", FORGET)
    for output in (facts / "model", facts / "model" / "out", rows):
        text = unlearn(*FAST, "--overwrite", code=3, forget=rows, output=output)
        assert "the output would overwrite or lie inside the input" in text
    assert not (facts / "model" / "out").exists()
    assert len(rows.read_text().splitlines()) == len(FORGET)


def test_what_is_to_be_resumed_must_be_there(unlearn):
    assert "there is no interrupted run to resume" in unlearn(*FAST, "--resume", code=3)


@pytest.mark.parametrize("precision", ["fp16"])
def test_a_precision_that_a_cpu_has_not(precision, unlearn):
    text = unlearn(*FAST, "--device", "cpu", "--set", f"train.precision={precision}", code=4)
    assert "fp16 needs a GPU" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(unlearn):
    assert "there is no CUDA device" in unlearn(*FAST, "--device", "cuda", code=4)


def test_several_processes_are_refused(unlearn, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = unlearn(*FAST, code=4)
    assert "runs in one process" in text
    assert "UnlearnTrainer" in text


@pytest.fixture
def small_disk():
    """Files of this process cannot grow beyond a size: every library sees its own error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("adapter", "save_every", "size"),
    [
        ("full", 1, 200_000),  # the Trainer's model.safetensors
        ("lora", 1, 200_000),  # its optimizer.pt, when the adapter is there already
        ("full", 50, 200_000),  # the output
        ("lora", 50, 50_000),  # the adapter of the output
    ],
)
def test_a_full_disk_leaves_what_can_be_resumed(
    adapter, save_every, size, unlearn, small_disk, tmp_path
):
    command = (
        *FAST,
        "--adapter",
        adapter,
        "--set",
        f"train.save_every={save_every}",
        "--steps",
        "3",
    )
    small_disk(size)
    text = unlearn(*command, code=6, left={"out.partial"})
    assert "the disk is full. Free some space" in text
    assert "with --resume" in text
    small_disk(resource.RLIM_INFINITY)
    unlearn(*command, "--resume")
    assert leftovers(tmp_path) == {"out"}
    assert len((tmp_path / "out" / "unlearning_steps.jsonl").read_text().splitlines()) == 3
