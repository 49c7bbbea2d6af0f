"""The real command in a process of its own: killed, interrupted, resumed; and what it imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from unlearn_runs import content, leftovers

COMMAND = [sys.executable, "-m", "orthomerge_cli", "unlearn"]
OPTIONS = ["--steps", "8", "--lr", "0.002", "--batch-size", "6", "--set", "train.save_every=2"]
OPTIONS += ["--set", "stop.level=none", "--set", "stop.evaluate_every=4"]


def arguments(facts, output, *more):
    named = {name: facts / f"{name}.jsonl" for name in ("forget", "retain", "holdout")}
    given = [str(part) for name, value in named.items() for part in (f"--{name}", value)]
    return [*COMMAND, "--model", str(facts / "model"), *given, "-o", str(output), *OPTIONS, *more]


def stopped(command, how, when):
    """Start a command, send it a signal when ``when()`` holds; return (code, stderr)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.fixture(scope="module")
def whole(facts, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(arguments(facts, output), check=True, capture_output=True)
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "work/checkpoint-2/optimizer.pt",  # while the first point is being written
        "work/checkpoint-6/trainer_state.json",  # while a later one is
    ],
)
def test_kill_and_resume(path, whole, facts, tmp_path):
    output = tmp_path / "out"
    seen = tmp_path / "out.partial" / path
    code, _ = stopped(arguments(facts, output), signal.SIGKILL, seen.exists)
    assert code == -signal.SIGKILL
    assert leftovers(tmp_path) == {"out.partial"}
    subprocess.run(arguments(facts, output, "--resume"), check=True, capture_output=True)
    assert content(output) == content(whole)
    assert leftovers(tmp_path) == {"out"}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(how, whole, facts, tmp_path):
    output = tmp_path / "out"
    seen = tmp_path / "out.partial" / "work" / "checkpoint-2" / "orthomerge.pt"
    code, err = stopped(arguments(facts, output), how, seen.exists)
    assert code == 130, err
    assert leftovers(tmp_path) == {"out.partial"}
    told = err.rpartition("interrupted. Continue with: ")[2].strip()
    assert told.startswith(f"orthomerge unlearn --model {facts}/model")
    assert told.endswith("--resume")
    assert "Traceback" not in err
    if how == signal.SIGTERM:
        return  # one of them is enough to go on from
    shell = told.replace("orthomerge", f"{sys.executable} -m orthomerge_cli", 1)
    subprocess.run(shell, shell=True, check=True, capture_output=True)
    assert content(output) == content(whole)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["unlearn", "--help"], ["methods", "list"], ["methods", "show", "npo"]],
)
def test_help_and_lists_import_nothing_heavy(arguments):
    code = (
        "import sys; sys.argv = ['orthomerge', *sys.argv[1:]]\n"
        "from orthomerge_cli.main import app; from orthomerge_cli.session import run_guarded\n"
        "assert run_guarded(app, sys.argv[1:]) == 0\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'accelerate', 'numpy') "
        "if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"


def test_methods_show_the_objectives(run):
    listed = run("methods", "list")[1]
    names = ["ga", "grad-diff", "npo", "simnpo", "dpo", "idk", "rmu", "undial", "wga", "satimp"]
    for name in [*names, "ceu", "pdu"]:
        line = next(line for line in listed.splitlines() if line.split()[0] == name)
        assert "unlearning objective" in line
        code, shown, _ = run("methods", "show", name)
        assert code == 0
        assert "arXiv" in shown
    facts = json.loads(run("methods", "list", "--json")[1])
    assert len(facts["objectives"]) == 12
    beta = next(o for o in facts["objectives"] if o["name"] == "npo")["parameters"][0]
    assert (beta["name"], beta["default"]) == ("beta", 0.1)
    code, _, err = run("methods", "show", "nppo")
    assert code == 4
    assert "unknown method or objective 'nppo'. Did you mean 'npo'?" in err
    assert run("methods", "show", "idk-dpo")[1].startswith("dpo: ")


def test_dry_run_says_what_will_be_done_and_writes_nothing(run, facts, tmp_path):
    before = leftovers(tmp_path)
    options = [part for name in ("forget", "retain", "holdout")
               for part in (f"--{name}", facts / f"{name}.jsonl")]  # fmt: skip
    common = ["unlearn", "--model", facts / "model", *options, "-o", tmp_path / "out", "--dry-run"]
    code, out, err = run(*common)
    assert code == 0
    assert "forget.jsonl:1: Question: Where does Ada live? Answer:[ Aldor.</s>]" in out
    assert "trained numbers" in out
    assert "forget     6 rows" in err
    code, out, _ = run(*common, "--json")
    facts_told = json.loads(out)
    assert facts_told["sets"]["forget"]["rows"] == 6
    assert {s["scored"] for row in facts_told["preview"] for s in row["runs"]} == {True, False}
    bytes_told = []
    for scope in ("q_proj", "."):
        code, out, err = run(*common, "--json", "--set", f"projection.scope={scope}")
        assert code == 0, err
        bytes_told.append(json.loads(out)["estimate"]["projection_bytes"])
    assert bytes_told[0] < bytes_told[1] == facts_told["estimate"]["projection_bytes"]
    assert leftovers(tmp_path) == before == set()


def test_with_json_it_prints_one_object_and_nothing_else(run, facts, tmp_path):
    options = [part for name in ("forget", "retain", "holdout")
               for part in (f"--{name}", facts / f"{name}.jsonl")]  # fmt: skip
    common = ["unlearn", "--model", facts / "model", *options, "-o", tmp_path / "out", "--json"]
    common += ["--steps", "2", "--lr", "0.002", "--projection", "off", "--set", "stop.level=none"]
    code, out, err = run(*common)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told.pop("output") == str(tmp_path / "out")
    assert told == json.loads((tmp_path / "out" / "unlearning.json").read_text())
    code, out, err = run(*common)
    assert (code, err) == (3, "")
    assert json.loads(out)["error"] == "OutputError"
    code, out, err = run(*common, "--overwrite", "--quiet")
    assert (code, err) == (0, "")


def test_the_door_in_python_does_the_same(run, facts, tmp_path):
    from orthomerge.recipe.unlearning import unlearn

    command = arguments(facts, tmp_path / "a", "--projection", "off", "--set", "beta=0.3")
    assert run(*command[len(COMMAND) - 1 :])[0] == 0
    result = unlearn(
        facts / "model", facts / "forget.jsonl", facts / "retain.jsonl", output=tmp_path / "b",
        holdout=facts / "holdout.jsonl", projection="off", beta=0.3,
        train={"max_steps": 8, "learning_rate": 0.002, "batch_size": 6, "save_every": 2},
        stop={"level": "none", "evaluate_every": 4},
    )  # fmt: skip
    assert result.output == tmp_path / "b"
    assert content(tmp_path / "a") == content(tmp_path / "b")
