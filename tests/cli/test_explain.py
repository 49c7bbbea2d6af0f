"""``orthomerge merge --explain``: its tables, its JSON, its refusals; and it writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import orthomerge
from orthomerge.errors import OrthoMergeError

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 30),
    "model.layers.0.mlp.up_proj": (40, 24),
    "model.layers.1.self_attn.q_proj": (24, 30),
}
RANKS = {"loud": 3, "quiet": 2, "first": 4, "second": 4}


def lora(folder: Path, factors: dict, *, r: int, dora: bool = False, **whole) -> None:
    tensors = dict(whole)
    for module, (B, A) in factors.items():
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = torch.ones(len(B))
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))


@pytest.fixture
def factors(tmp_path, monkeypatch, write_folder) -> dict[str, dict]:
    """Two unrelated adapters, one a hundred times as loud; two of one initialisation; a base."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    start = {name: normal(4, shape[1]) for name, shape in MODULES.items()}
    made = {}
    for adapter, r in RANKS.items():
        own = {}
        for name, (o, n) in MODULES.items():
            fresh = adapter in ("loud", "quiet")
            A = normal(r, n) if fresh else start[name] + 0.02 * normal(r, n)
            own[name] = ((100 if adapter == "loud" else 1) * normal(o, r), A)
        lora(tmp_path / adapter, own, r=r)
        made[adapter] = own
    write_folder("base", {f"{name}.weight": normal(*shape) for name, shape in MODULES.items()})
    return made


def files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_tables_and_verdict_and_nothing_written(factors, run, tmp_path) -> None:
    before = files(tmp_path)
    code, out, err = run("merge", "loud", "quiet", "--explain")
    assert code == 0
    assert files(tmp_path) == before
    assert "method do-merging, chosen by the inputs" in err
    assert all(name in out for name in [*MODULES, "all 3 modules", "loud", "quiet"])
    for column in (
        "imbalance",
        "MV col",
        "cos sum",
        "ρ A",
        "drift B",
        "frames A",
        "eff. rank",
        "λ",
    ):
        assert column in out
    assert "→ 0.00" in out  # overlap before and after
    last = out.strip().splitlines()[-1]
    assert last.startswith("verdict  Adapter 1 is ")
    assert "whether the mean gains" in last


def test_json_is_one_object_with_everything(factors, run, tmp_path) -> None:
    before = files(tmp_path)
    code, out, err = run("merge", "loud", "quiet", "--explain", "--json", "-o", "never")
    assert (code, err) == (0, "")
    assert files(tmp_path) == before
    facts = json.loads(out)
    assert facts["verdict"]["decoupling_matters"] is True
    assert (facts["method"], facts["base"], facts["models"]) == (
        "do-merging",
        None,
        ["loud", "quiet"],
    )
    assert sorted(module["name"] for module in facts["modules"]) == sorted(MODULES)
    module = facts["modules"][0]
    name = module["name"]
    shape = MODULES[name]
    D = [
        2 * (B.double() @ A.double()).numpy()
        for B, A in (factors[x][name] for x in facts["models"])
    ]
    assert module["shape"] == list(shape)
    assert module["ranks"] == [3, 2]
    sizes = [float(np.sqrt((X**2).mean())) for X in D]
    assert module["sizes"] == pytest.approx(sizes, rel=1e-5)
    assert module["cosines"][0][1] == pytest.approx(
        (D[0] * D[1]).sum() / np.linalg.norm(D[0]) / np.linalg.norm(D[1]), abs=1e-5
    )
    total = sum(D)
    assert module["sum_alignment"] == pytest.approx(
        [(X * total).sum() / np.linalg.norm(X) / np.linalg.norm(total) for X in D], abs=1e-5
    )
    assert module["A"]["overlap_after"] == pytest.approx(0, abs=1e-6)
    assert module["A"]["drift"] > 0
    assert (module["rank"], module["energy"], module["scale"]) == (5, pytest.approx(1), 1)
    assert facts["total"]["modules"] == 3
    assert facts["total"]["least_sum_alignment"] == min(facts["total"]["sum_alignment"])
    assert not {"inner", "spectrum"} & set(module)


def merged(folder: Path, name: str) -> np.ndarray:
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["rank_pattern"].get(name, config["r"])
    scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / rank
    B, A = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
    return scale * (B @ A).numpy()


@pytest.mark.parametrize("method", ["do-merging", "ties", "tsv-m", "task-arithmetic"])
def test_alignment_is_that_of_the_adapter_which_the_merge_writes(
    factors, run, tmp_path, method
) -> None:
    arguments = ["merge", "loud", "quiet", "first", "-m", method, "-w", "1", "-w", "20", "-w", "-3"]
    _, out, _ = run(*arguments, "--explain", "--json")
    assert run(*arguments, "-o", "out")[0] == 0
    for module in json.loads(out)["modules"]:
        T = merged(tmp_path / "out", module["name"])
        for at, adapter in enumerate(("loud", "quiet", "first")):
            B, A = factors[adapter][module["name"]]
            D = (B.double() @ A.double()).numpy() * (1, 1, -1)[at]
            wanted = (D * T).sum() / np.linalg.norm(D) / np.linalg.norm(T)
            assert module["alignment"][at] == pytest.approx(wanted, abs=2e-5)


def test_the_shared_start_is_seen(factors, run) -> None:
    code, out, _ = run("merge", "first", "second", "--explain", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["verdict"]["shared"] == "A"
    assert facts["total"]["A"]["principal_cosine"] > 0.99 > facts["total"]["A"]["chance"]
    # do-merging spares the shared side, as the verdict says.
    assert facts["total"]["A"]["drift"] == 0 < facts["total"]["B"]["drift"]


@pytest.mark.parametrize("rank", ["2", "energy:0.5", "parameters:400"])
def test_the_rank_asked_for_is_the_rank_written_and_its_energy_kept(
    factors, run, tmp_path, rank
) -> None:
    arguments = ["merge", "first", "second", "-m", "task-arithmetic", "--rank", rank]
    _, out, _ = run(*arguments, "--explain", "--json")
    assert run(*arguments, "-o", "out")[0] == 0
    facts = json.loads(out)
    for module in facts["modules"]:
        D = sum(
            (B.double() @ A.double()).numpy()
            for B, A in (factors[x][module["name"]] for x in ("first", "second"))
        )
        s = np.linalg.svd(D, compute_uv=False) ** 2
        assert module["energy"] == pytest.approx(s[: module["rank"]].sum() / s.sum(), abs=1e-6)
        written = merged(tmp_path / "out", module["name"])
        assert np.linalg.matrix_rank(written, tol=1e-3) == module["rank"]
    assert facts["total"]["least_energy"] == min(m["energy"] for m in facts["modules"])


def test_with_a_base_the_method_of_factors_is_measured_all_the_same(factors, run) -> None:
    plain = json.loads(run("merge", "loud", "quiet", "--explain", "--json")[1])
    based = json.loads(run("merge", "loud", "quiet", "--base", "base", "--explain", "--json")[1])
    assert based["total"]["alignment"] == pytest.approx(plain["total"]["alignment"], abs=1e-6)
    assert [m["rank"] for m in based["modules"]] == [None] * 3
    ours = ["merge", "loud", "quiet", "--base", "base", "-m", "task-arithmetic", "--explain"]
    summed = json.loads(run(*ours, "--json")[1])
    assert summed["total"]["alignment"] == pytest.approx(summed["total"]["sum_alignment"], abs=1e-6)
    assert not summed["notes"]


def test_a_method_of_full_weights_says_what_it_cannot_know(factors, run) -> None:
    arguments = ["merge", "loud", "quiet", "--base", "base", "-m", "ties", "--explain"]
    code, out, err = run(*arguments)
    assert code == 0
    assert "ties with a base merges full weights" in err
    assert "cos merged" not in out
    facts = json.loads(run(*arguments, "--json")[1])
    assert facts["total"]["alignment"] is None
    assert facts["total"]["imbalance"] > 50


def test_dora_is_compared_by_its_low_rank_part(factors, run, tmp_path) -> None:
    lora(tmp_path / "dora", factors["first"], r=4, dora=True)
    code, _, err = run("merge", "dora", "second", "--explain")
    assert (code, "needs" in err or "Pass --base" in err) == (3, True)
    for more in (["--as", "dora", "--rank", "energy:0.9"], [], ["-m", "task-arithmetic"]):
        code, _, err = run("merge", "dora", "second", "--base", "base", *more, "--explain")
        assert code == 0, err
        assert "of DoRA only the low-rank part" in err


def test_recipes_rules_and_strength_are_those_of_the_merge(factors, run, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(
        "models: [first, {path: second, weight: 2.0}]\n"
        "method: task-arithmetic\nparameters: {scale: 0.5}\nnorm_matched: 1.0\n"
    )
    code, out, _ = run("merge", "--recipe", "r.yaml", "--explain", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["modules"][0]["weights"] == [1.0, 2.0]
    # Of 0.5 (D_1 + 2 D_2) to the size of D_1 + D_2.
    parts = {
        x: np.concatenate(
            [(B.double() @ A.double()).numpy().ravel() for B, A in factors[x].values()]
        )
        for x in ("first", "second")
    }
    one, two = parts.values()
    wanted = np.linalg.norm(one + two) / np.linalg.norm(one + 2 * two)
    assert facts["total"]["scale"] == pytest.approx([wanted] * 3, rel=1e-5)


def test_a_module_that_one_adapter_lacks(factors, run, tmp_path) -> None:
    some = dict(list(factors["quiet"].items())[:2])
    lora(tmp_path / "some", some, r=2)
    for absent in ("zero", "skip"):
        code, out, _ = run("merge", "first", "some", "--absent", absent, "--explain", "--json")
        assert code == 0
        last = json.loads(out)["modules"][-1]
        assert last["ranks"] == [4, 0]
        assert (last["sizes"][1], last["alignment"][1], last["imbalance"]) == (0, None, None)


def test_heads_are_said_to_be_left_out(factors, run, tmp_path) -> None:
    head = {"base_model.model.score.weight": torch.ones(2, 4)}
    lora(tmp_path / "head", factors["first"], r=4, **head)
    code, _, err = run("merge", "head", "second", "--explain")
    assert code == 0
    assert "1 tensors beside the factors" in err


@pytest.mark.parametrize("order", [("first", "base"), ("base", "first")])
def test_other_sources_are_sent_to_diagnose(factors, run, order) -> None:
    code, out, err = run("merge", *order, "--explain")
    assert (code, out) == (4, "")
    assert "base: --explain compares LoRA adapters (found full checkpoint)" in err
    assert "orthomerge diagnose" in err
    code, out, _ = run("merge", *order, "--explain", "--json")
    assert "orthomerge diagnose" in json.loads(out)["remedy"]


def test_refusals_are_those_of_the_merge(factors, run) -> None:
    for wrong in (["-m", "no-such"], ["missing-folder"], ["--rank", "0"], ["-m", "geodesic"]):
        plain = run("merge", "first", "second", *wrong, "-o", "never")
        explained = run("merge", "first", "second", *wrong, "-o", "never", "--explain")
        assert plain[0] == explained[0] != 0
        assert plain[2] == explained[2]


@pytest.mark.parametrize("flag", ["--dry-run", "--resume", "--overwrite"])
def test_flags_of_a_run_are_refused(factors, run, flag) -> None:
    code, _, err = run("merge", "first", "second", "--explain", flag)
    assert code == 2
    assert "--explain" in err


def test_damaged_factors_are_named(factors, run, tmp_path) -> None:
    broken = {name: (B.clone(), A) for name, (B, A) in factors["first"].items()}
    broken["model.layers.0.mlp.up_proj"][0][0, 0] = float("nan")
    lora(tmp_path / "broken", broken, r=4)
    code, _, err = run("merge", "broken", "second", "--explain")
    assert code == 5
    assert "broken" in err
    assert "up_proj" in err


def test_a_budget_of_a_single_module_is_enough(factors, run) -> None:
    small = ["merge", "first", "second", "--memory-budget", "100kB", "--workers", "2", "--explain"]
    code, out, err = run(*small, "--json")
    assert code == 0, err
    assert len(json.loads(out)["modules"]) == 3


def test_the_door_of_python_says_what_the_command_says(factors, run) -> None:
    for base in (None, "base"):
        more = ["--base", base] if base else []
        facts = json.loads(run("merge", "loud", "quiet", *more, "--explain", "--json")[1])
        found = orthomerge.explain(["loud", "quiet"], base=base)
        assert json.loads(json.dumps(found.comparison.as_dict()))["total"] == facts["total"]
        assert found.verdict.text == facts["verdict"]["text"]
        assert list(found.notes) == facts["notes"]
    with pytest.raises(OrthoMergeError, match="compares LoRA adapters"):
        orthomerge.explain(["base", "base"])
