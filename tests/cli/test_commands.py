"""The command line: what each command prints, its JSON, its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three models and a base in the working folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "a", "b", "c"]):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(6, 4, generator=generator) for i in range(2)}
        save_file(tensors, tmp_path / f"{name}.safetensors", {"format": "pt"})
    return tmp_path


def test_merge_of_two_files_needs_nothing_else(files, run) -> None:
    code, out, err = run("merge", "a.safetensors", "b.safetensors")
    assert code == 0
    assert out == "merged.safetensors\n"
    assert "geodesic, chosen by the inputs" in err
    a, b, merged = (load_file(f"{n}.safetensors") for n in ("a", "b", "merged"))
    torch.testing.assert_close(merged["layers.0.w"], (a["layers.0.w"] + b["layers.0.w"]) / 2)


def test_merge_into_a_folder_with_options(files, run) -> None:
    code, out, _ = run(
        "merge", "a.safetensors", "b.safetensors", "--base", "base.safetensors",
        "-m", "task-arithmetic", "-w", "1", "-w", "0.5", "--set", "scale=0.4",
        "--dtype", "bfloat16", "--max-shard-size", "60B", "-o", "out", "--json",
    )  # fmt: skip
    facts = json.loads(out)
    assert code == 0
    assert facts["method"] == "task-arithmetic"
    assert len(facts["shards"]) == 2
    assert facts["output_dtypes"] == {"BF16": 96}
    record = json.loads((files / "out" / "orthomerge.json").read_text())
    assert record["recipe"]["models"][1] == {"path": "b.safetensors", "weight": 0.5}
    assert record["parameters"]["scale"] == 0.4
    assert record["sources"][0]["role"] == "base"
    assert (files / "out" / "README.md").read_text().startswith("---\nlibrary_name")


def test_no_provenance_leaves_no_trace(files, run) -> None:
    run("merge", "a.safetensors", "b.safetensors", "-o", "out", "--no-provenance", "-q")
    assert {p.name for p in (files / "out").iterdir()} == {"model.safetensors"}
    run("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--no-provenance", "-q")
    assert b"orthomerge" not in (files / "m.safetensors").read_bytes()


def test_recipe_with_overrides(files, run) -> None:
    (files / "r.yaml").write_text("method: slerp\nmodels: [a.safetensors, b.safetensors]\n")
    code, out, _ = run("merge", "-r", "r.yaml", "--set", "t=0", "-o", "m.safetensors")
    assert (code, out) == (0, "m.safetensors\n")
    assert run("diff", "a.safetensors", "m.safetensors", "--fail-above", "1e-6")[0] == 0


def test_existing_output_is_refused_and_replaced_on_request(files, run) -> None:
    assert run("merge", "a.safetensors", "b.safetensors", "-q")[0] == 0
    before = (files / "merged.safetensors").read_bytes()
    code, _, err = run("merge", "a.safetensors", "c.safetensors", "-q")
    assert code == 3
    assert "already exists" in err
    assert "--overwrite" in err
    assert (files / "merged.safetensors").read_bytes() == before
    assert run("merge", "a.safetensors", "c.safetensors", "-q", "--overwrite")[0] == 0
    assert (files / "merged.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["merge"], 2, "Give models"),
        (["merge", "a.safetensors", "b.safetensors", "-w", "1"], 2, "one per model"),
        (["merge", "a.safetensors", "b.safetensors", "--colour", "red"], 2, "--colour"),
        (["merge", "none.safetensors", "b.safetensors"], 3, "no such file"),
        (["merge", "org/name", "b.safetensors"], 3, "hf:org/name"),
        (["merge", "a.safetensors", "b.safetensors", "-m", "tise"], 4, "Did you mean 'ties'"),
        (["merge", "a.safetensors", "b.safetensors", "--set", "x"], 4, "key=value"),
        (["merge", "a.safetensors", "-m", "slerp"], 4, "exactly 2"),
        (["merge", "nan.safetensors", "b.safetensors"], 5, "NaN or infinity"),
        (["plan", "a.safetensors", "b.safetensors", "--memory-budget", "99B"], 6, "budget"),
        (["diff", "a.safetensors", "b.safetensors", "--fail-above", "0.1"], 7, "differ by more"),
        (["merge", "a.safetensors", "b.safetensors", "--resume"], 3, "no interrupted run"),
        (["validate", "none.yaml"], 4, "cannot be read"),
        (["methods", "show", "slurp"], 4, "Did you mean 'slerp'"),
        (["inspect", "a.txt"], 3, "not checkpoints"),
        (["init", "ties", "taken.yaml"], 3, "already exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_exit_codes_and_messages(files, run, arguments, code, words) -> None:
    (files / "a.txt").write_text("x")
    (files / "taken.yaml").write_text("mine")
    bad = load_file(files / "a.safetensors")
    bad["layers.1.w"][2, 1] = float("nan")
    save_file(bad, files / "nan.safetensors")
    found, out, err = run(*arguments)
    assert found == code
    assert words in err
    assert "Traceback" not in err
    assert not (files / "merged.safetensors").exists()
    assert (files / "taken.yaml").read_text() == "mine"
    if code not in (2,):
        json_code, out, _ = run(*arguments, "--json")
        facts = json.loads(out)
        assert json_code == code == facts["exit_code"]


def test_debug_shows_the_trace(files, run) -> None:
    code, _, err = run("--debug", "merge", "none.safetensors")
    assert code == 3
    assert "Traceback" in err


def test_a_bug_is_called_a_bug(run, monkeypatch) -> None:
    import orthomerge.merging.registry as registry

    def broken() -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(registry, "all_methods", broken)
    code, _, err = run("methods", "list")
    assert code == 1
    assert "bug in orthomerge: ZeroDivisionError: deep inside" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_names_from_files_cannot_drive_the_terminal(files, run) -> None:
    save_file({"w\x07\r\x1b[31m": torch.zeros(2)}, files / "x.safetensors")
    save_file({"w\x07\r\x1b[31m": torch.zeros(3)}, files / "y.safetensors")
    printed = [
        *run("merge", "x.safetensors", "y.safetensors")[1:],
        *run("inspect", "x.safetensors", "--tensors")[1:],
        *run("diff", "x.safetensors", "y.safetensors")[1:],
    ]
    assert sum(text.count(r"w\x07\r\x1b[31m") for text in printed) >= 3
    assert not set("".join(printed)) & set("\x07\r\x1b")


def test_plan_says_what_would_happen_and_writes_nothing(files, run) -> None:
    before = set(files.iterdir())
    code, out, _ = run("plan", "a.safetensors", "b.safetensors", "-o", "out")
    assert code == 0
    for words in ("working memory", "reads", "384 B", "F32, rounded once"):
        assert words in out
    _, out, _ = run("plan", "a.safetensors", "b.safetensors", "--json")
    facts = json.loads(out)
    assert (facts["read_bytes"], facts["tensors"], facts["method"]) == (384, 2, "geodesic")
    assert run("merge", "a.safetensors", "b.safetensors", "--dry-run")[0] == 0
    assert set(files.iterdir()) == before


def test_validate_reports_all_files_at_once(files, run) -> None:
    (files / "good.yaml").write_text("models: [a.safetensors]\n")
    (files / "bad.yaml").write_text("models: [a]\nmethd: x\n")
    (files / "worse.yaml").write_text("models: [a]\nmethod: ties\nparameters: {dnsity: 1}\n")
    assert run("validate", "good.yaml")[:2] == (0, "good.yaml: valid\n")
    code, _, err = run("validate", "good.yaml", "bad.yaml", "worse.yaml")
    assert code == 4
    assert "bad.yaml:2:1" in err
    assert "worse.yaml:3:14" in err


def test_inspect_shows_kind_sizes_and_provenance(files, run) -> None:
    run("merge", "a.safetensors", "b.safetensors", "-q")
    _, out, _ = run("inspect", "merged.safetensors", "--tensors", "--hash")
    for words in ("full checkpoint", "48 in 2 tensors", "F32", "geodesic", "layers.0.w", "blake3:"):
        assert words in out
    _, out, _ = run("inspect", "merged.safetensors", "--json", "--hash")
    facts = json.loads(out)
    _, out, _ = run("inspect", "a.safetensors", "--json", "--hash")
    assert facts["provenance"]["sources"][0]["digest"] == json.loads(out)["digest"]


def test_diff_lists_the_largest_change_first(files, run) -> None:
    changed = load_file("a.safetensors")
    changed["layers.1.w"] *= 2
    changed["extra"] = torch.zeros(1)
    save_file(changed, "changed.safetensors")
    _, out, _ = run("diff", "a.safetensors", "changed.safetensors")
    assert "2 of 3 tensors differ" in out
    assert out.index("only-second extra") < out.index("1.000e+00  cos 1.000000  changed")
    _, out, _ = run("diff", "a.safetensors", "changed.safetensors", "--json")
    by_name = {d["name"]: d for d in json.loads(out)["differences"]}
    assert by_name["layers.0.w"]["status"] == "equal"
    assert by_name["layers.1.w"]["relative"] == pytest.approx(1.0)


def test_methods_list_and_show(run) -> None:
    _, out, _ = run("methods", "list")
    assert all(name in out for name in ("linear", "ties", "orthomerge", "slerp"))
    _, out, _ = run("methods", "show", "ties")
    assert "density      number in (0, 1], default 0.2" in out
    _, out, _ = run("methods", "show", "orthomerge", "--json")
    assert {p["name"] for p in json.loads(out)["parameters"]} >= {"strength", "correction", "c_max"}
    _, out, _ = run("methods", "list", "--json")
    assert len(json.loads(out)["methods"]) >= 6
    code, out, _ = run("methods", "list", "--jsn", "--json")
    assert (code, json.loads(out)["error"]) == (2, "UsageError")


def test_init_writes_a_recipe_that_validates(files, run) -> None:
    assert run("init", "ties", "new.yaml")[0] == 0
    assert run("validate", "new.yaml")[0] == 0


def test_version_and_help(run) -> None:
    code, out, _ = run("--version")
    assert (code, out.split()[0]) == (0, "orthomerge")
    code, out, _ = run("--help")
    assert code == 0
    assert all(c in out for c in ("merge", "plan", "validate", "inspect", "diff", "init", "demo"))


def test_installed_script_and_module_agree() -> None:
    script = shutil.which("orthomerge", path=f"{sys.prefix}/bin")
    outputs = [
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in ([script], [sys.executable, "-m", "orthomerge_cli"])
        if command[0]
    ]
    assert len(set(outputs)) == 1


def test_extract_reports_and_writes_then_negate_undoes(files, run) -> None:
    base = {"body.a.weight": torch.randn(6, 8), "norm.weight": torch.ones(2)}
    D = torch.outer(torch.arange(6.0), torch.arange(8.0))
    changed = {"body.a.weight": base["body.a.weight"] + D, "norm.weight": torch.zeros(2)}
    save_file(base, "old.safetensors")
    save_file(changed, "new.safetensors")
    command = ["extract", "new.safetensors", "--base", "old.safetensors"]
    code, out, err = run(*command, "-o", "lora", "--kind", "lora")
    assert code == 0
    assert "low rank (up to 1) 100.0%; 0.0% is left" in out
    assert out.endswith("\nlora\n")
    assert "norm.weight" in err
    code, out, _ = run(*command, "-o", "both", "--block-size", "4", "--json")
    facts = json.loads(out)
    assert code == 0
    assert set(facts["adapters"]) == {"oft", "lora"}
    assert facts["layers"][0]["name"] == "body.a.weight"
    assert facts["unexplained"][0]["name"] == "norm.weight"
    assert {p.name for p in (files / "both").iterdir()} == {"oft", "lora", "orthomerge.json"}
    code, out, _ = run("negate", "lora", "-o", "undo", "--json")
    assert code == 0
    assert json.loads(out)["strength"] == 1.0
    there, back = (load_file(f"{n}/adapter_model.safetensors") for n in ("lora", "undo"))
    key = "base_model.model.body.a.lora_B.weight"
    assert torch.equal(back[key], -there[key])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["extract", "a.safetensors", "--base", "b.safetensors"], 2, "--output"),
        (["extract", "a.safetensors", "--base", "b.safetensors", "-o", "x"], 3, "no linear"),
        (["extract", "a.safetensors", "--base", "b.safetensors", "-o", "x", "-k", "o"], 4, "kind"),
        (["negate", "a.safetensors", "-o", "x"], 3, "full checkpoint"),
        (["negate", "none", "-o", "x"], 3, "no such file"),
    ],
)
def test_extract_and_negate_refuse(files, run, arguments, code, words) -> None:
    found, _, err = run(*arguments)
    assert found == code
    assert words in err
    assert not (files / "x").exists()
