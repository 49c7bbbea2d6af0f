"""``orthomerge diagnose``: what it prints, its JSON, its picture, its exit codes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def folders(tmp_path, monkeypatch, write_folder):
    """A base, one that is turned, one with noise, and an OFT adapter, in the working folder."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    names = [f"model.layers.{at}.{part}.weight" for at in (0, 1) for part in ("mlp.up", "attn.q")]
    base = {name: normal(24, 16) for name in names} | {"model.norm.weight": torch.ones(16)}
    K = 0.05 * normal(16, 16)
    R = torch.linalg.matrix_exp(K - K.T)
    write_folder("base", base, shards=2)
    write_folder("turned", {k: W @ R if W.ndim == 2 else W for k, W in base.items()})
    write_folder("noisy", {k: W + 0.05 * normal(*W.shape) for k, W in base.items()})
    (tmp_path / "oft").mkdir()
    packed = {"base_model.model.model.layers.0.attn.q.oft_R.weight": 0.1 * normal(4, 6)}
    save_file(packed, tmp_path / "oft" / "adapter_model.safetensors")
    config = '{"peft_type": "OFT", "oft_block_size": 4, "r": 0, "peft_version": "0.19.0"}'
    (tmp_path / "oft" / "adapter_config.json").write_text(config)
    return tmp_path


def test_table_and_verdict_of_noise(folders, run) -> None:
    code, out, err = run("diagnose", "noisy", "--base", "base")
    assert code == 0
    assert not err
    assert "layers   4 measured; left out: 1 vectors and norms" in out
    assert all(f"model.layers.{at}.mlp.up" in out for at in (0, 1))
    assert "residual/noise" in out
    assert out.strip().splitlines()[-1].startswith("verdict  Not rotational")


def test_several_models_get_a_row_each_and_the_most_rotational_layer_is_first(folders, run) -> None:
    code, out, _ = run("diagnose", "noisy", "turned", "--base", "base", "--limit", "1")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.strip().endswith(" 0")]
    assert len(rows) == 2
    assert float(rows[1][2]) < 0.05 < 0.5 < float(rows[0][3])
    assert "… and 3 more (--limit, --json)" in out
    assert "by model 0, 4" in out


def test_json_has_everything_and_nothing_else_is_printed(folders, run) -> None:
    code, out, err = run("diagnose", "turned", "noisy", "--base", "base", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["models"] == ["turned", "noisy"]
    assert facts["base"] == "base"
    assert facts["settings"] == {"anchor": 1e-3, "block": None, "max_rows": 2048, "device": "cpu"}
    assert facts["verdict"]["by_model"] == [4, 0]
    assert facts["verdict"]["text"].startswith("Rotational in 4 of 4 layers")
    layer = facts["layers"][0]
    assert layer["name"] == "model.layers.0.mlp.up.weight"
    assert layer["shape"] == [24, 16]
    assert layer["models"][0]["over_noise"] < 0.05 < layer["models"][1]["over_noise"]
    assert layer["energy"]["rotated"] == pytest.approx(layer["energy"]["base"], rel=1e-6)
    assert layer["generator_cosines"][0][0] == 1
    assert layer["merged"]["determinant"] == 1


def test_layers_anchor_and_block_reach_the_fits(folders, run) -> None:
    arguments = ("diagnose", "turned", "--base", "base", "--json", "--layers", "*.0.attn*")
    loose = json.loads(run(*arguments)[1])["layers"]
    tight = json.loads(run(*arguments, "--anchor", "1")[1])["layers"]
    blocks = json.loads(run(*arguments, "--block", "4")[1])["layers"]
    assert [layer["name"] for layer in loose] == ["model.layers.0.attn.q.weight"]
    assert tight[0]["models"][0]["largest_angle"] < loose[0]["models"][0]["largest_angle"]
    assert blocks[0]["models"][0]["over_noise"] > 0.5


def test_adapters_alone_and_with_their_base(folders, run) -> None:
    code, out, _ = run("diagnose", "oft")
    assert code == 0
    assert "theta" in out
    assert "Rotations by construction in 1 modules" in out
    code, out, _ = run("diagnose", "oft", "--base", "base")
    assert code == 0
    assert "verdict  An exact rotation of the base in all 1 changed layers" in out


def test_plot_is_written(folders, run) -> None:
    code, out, _ = run("diagnose", "turned", "noisy", "--base", "base", "--plot", "plot.png")
    assert code == 0
    assert "plot     plot.png" in out
    assert (folders / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["noisy"], 4, "Pass --base"),
        (["noisy", "--base", "base", "--layers", "none*"], 4, "no layer to look at"),
        (["noisy", "--base", "base", "--block", "5"], 4, "block size does not divide"),
        (["absent", "--base", "base"], 3, "absent"),
        (["narrow", "--base", "base"], 3, "shapes differ"),
        (["broken", "--base", "base"], 5, "NaN"),
        (["noisy", "--base", "base", "--plot", "plot.xyz"], 3, "cannot be written"),
        (["noisy", "--base", "base", "--anchor", "-1"], 2, "--anchor"),
        (["noisy", "--base", "base", "--device", "abacus"], 6, "no such device"),
    ],
    ids=["no base", "no layer", "block", "absent", "shapes", "nan", "plot", "usage", "device"],
)
def test_exit_codes(folders, run, write_folder, arguments, code, message) -> None:
    names = [f"model.layers.{at}.{part}.weight" for at in (0, 1) for part in ("mlp.up", "attn.q")]
    write_folder("narrow", {name: torch.ones(24, 15) for name in names})
    write_folder("broken", {name: torch.full((24, 16), torch.nan) for name in names})
    found, out, err = run("diagnose", *arguments)
    assert found == code
    assert message in err
    assert "verdict" not in out


def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    folders, run, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    code, _, err = run("diagnose", "absent", "--plot", "plot.png")
    assert code == 6
    assert "pip install 'orthomerge[demo]'" in err


def test_control_characters_in_names_are_spelled_out(tmp_path, run, write_file) -> None:
    name = "layers.0.\x1b[31mup[bold].weight"
    base = write_file("base.safetensors", {name: torch.eye(4)})
    model = write_file("model.safetensors", {name: torch.eye(4) + 0.1})
    code, out, _ = run("diagnose", model, "--base", base)
    assert code == 0
    assert "\x1b" not in out
    assert "\\x1b[31mup[bold]" in out
