"""LoRA, BOFT and HRA adapters by their headers: what is recognised, and how each refusal reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orthomerge.adapters.sources import Source, open_source
from orthomerge.adapters.updates import adapter_updates
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.errors import AdapterError, NumericalError, OrthoMergeError, ProblemsError

PREFIX = "base_model.model."
A, B = torch.ones(2, 4), torch.ones(3, 2)
PLAIN = {"q.lora_A.weight": A, "q.lora_B.weight": B}


def write(
    folder: Path, tensors: dict[str, torch.Tensor], kind: str = "LORA", **config: Any
) -> Source:
    folder.mkdir(exist_ok=True)
    values = {PREFIX + name: value.clone() for name, value in tensors.items()}
    save_file(values, folder / "adapter_model.safetensors")
    content = {"peft_type": kind, "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return open_source(folder)


def updates(source: Source, base: dict[str, torch.Tensor]) -> Any:
    return adapter_updates(source, open_checkpoint(base).tensors)


def test_rank_alpha_and_scale_are_exposed(tmp_path: Path) -> None:
    more = {"k.lora_A.weight": torch.ones(1, 4), "k.lora_B.weight": torch.ones(3, 1)}
    source = write(tmp_path, {**PLAIN, **more}, lora_alpha=8, alpha_pattern={"k": 3})
    assert source.lora is not None
    assert source.rotations is None
    q, k = source.lora.modules["q"], source.lora.modules["k"]
    assert (q.rank, q.alpha, q.scale, q.rows, q.shape, q.kind) == (2, 8.0, 4.0, 3, (4,), "linear")
    assert (k.rank, k.alpha, k.scale) == (1, 3.0, 3.0)
    assert source.description == "LoRA adapter (rank 1 to 2)"


def test_rslora_and_dora_are_named(tmp_path: Path) -> None:
    m = {"q.lora_magnitude_vector.weight": torch.ones(3)}
    source = write(tmp_path, {**PLAIN, **m}, use_rslora=True, use_dora=True, lora_alpha=4)
    assert source.description == "LoRA adapter (rank 2, rsLoRA, DoRA)"
    assert source.lora is not None
    assert source.lora.modules["q"].scale == pytest.approx(4 / math.sqrt(2))
    (update,) = updates(source, {"q.weight": torch.ones(3, 4)}).updates.values()
    assert update.needs_base
    with pytest.raises(AdapterError, match="DoRA cannot be applied without the base"):
        update.delta(None, (3, 4), torch.float32)
    with pytest.raises(NumericalError, match="norm of a feature"):
        update.delta(-4 / math.sqrt(2) * B @ A, (3, 4), torch.float32)


@pytest.mark.parametrize(
    ("changes", "config", "problem"),
    [
        ({"q.lora_B.weight": None}, {}, "one factor of a module is missing"),
        ({"q.lora_B.weight": torch.ones(3, 3)}, {}, "ranks differ"),
        ({"q.lora_A.weight": torch.ones(4)}, {}, "not the two factors"),
        ({"q.lora_A.weight": torch.ones(0, 4)}, {}, "not the two factors"),
        ({"q.lora_A.weight": torch.ones(2, 4, 3, 3)}, {}, "not the two factors"),
        ({"q.lora_embedding_A": torch.ones(2, 4)}, {}, "one factor of a module is missing"),
        ({"q.lora_A.weight": A.int()}, {}, "unsupported dtype"),
        ({"q.lora_magnitude_vector": torch.ones(3)}, {}, "use_dora contradicts"),
        ({}, {"use_dora": True}, "use_dora contradicts"),
        ({}, {"lora_bias": True}, "lora_bias contradicts"),
        ({"q.lora_magnitude_vector": torch.ones(4)}, {"use_dora": True}, "one magnitude per"),
        ({"q.lora_A.default.weight": A}, {}, "no parameter of a known LoRA layout"),
        ({"k.oft_R.weight": A}, {}, "the tensors are those of OFT"),
        ({}, {"alpha_pattern": {"(": 1}}, "alpha_pattern must map"),
        ({}, {"alpha_pattern": {"q": "2"}}, "alpha_pattern must map"),
        ({}, {"alpha_pattern": [1]}, "alpha_pattern must map"),
        ({}, {"lora_alpha": "2"}, "lora_alpha has the wrong type"),
        ({}, {"target_parameters": ["experts.up"]}, "target_parameters is set"),
        ({}, {"alora_invocation_tokens": [1]}, "aLoRA"),
        ({}, {"use_qalora": True}, "QALoRA"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model"),
        ({}, {"init_lora_weights": "olora"}, "changed the base's weights"),
    ],
)
def test_each_fault_gives_one_clear_error(
    tmp_path: Path, changes: dict[str, Any], config: dict[str, Any], problem: str
) -> None:
    tensors = {name: value for name, value in {**PLAIN, **changes}.items() if value is not None}
    with pytest.raises(AdapterError, match=problem) as caught:
        write(tmp_path, tensors, **config)
    assert caught.value.file
    assert caught.value.remedy


def test_other_kinds_are_named(tmp_path: Path) -> None:
    for kind, tensors in (("XLORA", PLAIN), ("VERA", {"q.vera_lambda_b": torch.ones(3)})):
        source = write(tmp_path / kind, tensors, kind)
        assert source.description == f"{kind} adapter"
        with pytest.raises(AdapterError, match=f"{kind} adapters are not supported"):
            updates(source, {"q.weight": torch.ones(3, 4)})
    with pytest.raises(AdapterError, match="the config says OFT, the tensors are those of LORA"):
        write(tmp_path / "wrong", PLAIN, "OFT")


ADA = {"q.lora_A": A, "q.lora_B": B, "q.lora_E": torch.tensor([[1.0], [3.0]])}


@pytest.mark.parametrize(("alpha", "scale"), [(5, 5 / 4.00001), (0, 2 / 4.00001)])
def test_adalora_has_its_values_between_the_factors(
    tmp_path: Path, alpha: int, scale: float
) -> None:
    """alpha over the rank it began with, which PEFT adds 1e-5 to; pruned modules are gone."""
    pruned = {"k.lora_A": A[:0], "k.lora_B": B[:, :0], "k.lora_E": torch.ones(0, 1)}
    source = write(tmp_path, {**ADA, **pruned}, "ADALORA", lora_alpha=alpha, init_r=4)
    assert (source.kind, source.description) == ("ADALORA", "AdaLoRA adapter (rank 2)")
    (update,) = updates(source, {"q.weight": torch.ones(3, 4)}).updates.values()
    assert len(update.keys) == 3
    delta = update.delta(None, (3, 4), torch.float64)
    torch.testing.assert_close(delta, torch.full((3, 4), 4 * scale).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("changes", "config", "problem"),
    [
        ({"q.lora_E": None}, {}, "a part of an AdaLoRA module is missing"),
        ({"q.lora_B": None}, {}, "a part of an AdaLoRA module is missing"),
        ({"q.lora_E": torch.ones(3, 1)}, {}, "not one singular value per rank"),
        ({"q.lora_A": torch.ones(3, 4)}, {}, "ranks differ"),
        ({"q.lora_A": torch.ones(2, 4, 1, 1)}, {}, "not the two factors"),
        ({"q.lora_A.weight": A}, {}, "no parameter of a known AdaLoRA layout"),
        (dict.fromkeys(ADA) | {"x.weight": A}, {}, "holds no AdaLoRA tensors"),
        ({}, {"init_r": 0}, "init_r must be 1 or more"),
        ({}, {"init_r": "4"}, "init_r has the wrong type"),
    ],
)
def test_malformed_adalora(
    tmp_path: Path, changes: dict[str, Any], config: dict[str, Any], problem: str
) -> None:
    tensors = {name: value for name, value in {**ADA, **changes}.items() if value is not None}
    with pytest.raises(AdapterError, match=problem) as caught:
        write(tmp_path, tensors, "ADALORA", **config)
    assert caught.value.file


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ({"q.weight": torch.ones(3, 5)}, "factors do not fit this weight"),
        ({"q.weight": torch.ones(3, 4, dtype=torch.int32)}, "not floating-point"),
        ({"k.weight": torch.ones(3, 4)}, "none of the 1 modules"),
        ({"x.q.weight": torch.ones(3, 4), "y.q.weight": torch.ones(3, 4)}, "fits several"),
    ],
)
def test_another_base_is_refused(
    tmp_path: Path, base: dict[str, torch.Tensor], problem: str
) -> None:
    with pytest.raises(AdapterError, match=problem):
        updates(write(tmp_path, PLAIN), base)


def test_all_problems_with_a_base_come_at_once(tmp_path: Path) -> None:
    more = {"k.lora_A.weight": A, "k.lora_B.weight": B, "head.weight": torch.ones(2, 2)}
    source = write(tmp_path, {**PLAIN, **more})
    base = {"q.weight": torch.ones(3, 5), "head.weight": torch.ones(3, 2)}
    with pytest.raises(ProblemsError) as caught:
        updates(source, base)
    found = {(error.tensor, error.problem.split()[-1]) for error in caught.value.problems}
    assert found == {("q.weight", "base"), ("k.weight", "model"), ("head.weight", "shape")}


def test_replacements_and_prefixes(tmp_path: Path) -> None:
    tensors = {**PLAIN, "q.base_layer.bias": torch.ones(3), "score.weight": torch.ones(2, 4)}
    source = write(tmp_path, {**tensors, "e.base_layer.weight": torch.ones(9, 2)})
    base = {"model.q.weight": torch.ones(3, 4), "model.q.bias": torch.ones(3)}
    found = updates(source, base)
    assert list(found.updates) == ["model.q.weight"]
    assert found.replacements == {
        "model.q.bias": f"{PREFIX}q.base_layer.bias",
        "score.weight": f"{PREFIX}score.weight",
    }


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    broken = {**PLAIN, "q.lora_B.weight": torch.full((3, 2), math.nan)}
    (update,) = updates(write(tmp_path, broken), {"q.weight": torch.ones(3, 4)}).updates.values()
    with pytest.raises(NumericalError, match=r"q\.lora_B\.weight.*NaN"):
        update.delta(None, (3, 4), torch.float32)


BLOCKS, SCALE = torch.zeros(1, 2, 2, 2), torch.ones(3, 1)


@pytest.mark.parametrize(
    ("kind", "tensors", "problem"),
    [
        ("BOFT", {"q.boft_R": BLOCKS}, "a BOFT module is incomplete"),
        ("BOFT", {"q.boft_R": BLOCKS[0], "q.boft_s": SCALE}, "not lists of square blocks"),
        ("BOFT", {"q.boft_R": BLOCKS, "q.boft_s": torch.ones(3, 2)}, "not one scale per"),
        ("BOFT", {"q.boft_R": torch.zeros(2, 3, 2, 2), "q.boft_s": SCALE}, "form no butterfly"),
        ("BOFT", {"q.boft_R": torch.zeros(2, 2, 3, 3), "q.boft_s": SCALE}, "form no butterfly"),
        ("HRA", {"q.hra_u": torch.zeros(4)}, "not a list of reflections"),
        ("HRA", {"q.hra_u": torch.zeros(4, 0)}, "not a list of reflections"),
        ("HRA", {"q.hra_u": torch.zeros(4, 2), "q.lora_A.weight": A}, "(config says|known HRA)"),
    ],
)
def test_malformed_rotations(
    tmp_path: Path, kind: str, tensors: dict[str, torch.Tensor], problem: str
) -> None:
    with pytest.raises(AdapterError, match=problem) as caught:
        write(tmp_path, tensors, kind)
    assert caught.value.remedy


@pytest.mark.parametrize("orthogonalised", [False, True])
def test_degenerate_reflections_are_refused(tmp_path: Path, orthogonalised: bool) -> None:
    u = torch.randn(4, 1).repeat(1, 2)
    twice = write(tmp_path / "a", {"q.hra_u": u}, "HRA", apply_GS=orthogonalised)
    zero = write(tmp_path / "b", {"q.hra_u": 0 * u}, "HRA", apply_GS=orthogonalised)
    W = torch.randn(3, 4)

    def delta(source: Source) -> torch.Tensor:
        return updates(source, {"q.weight": W}).updates["q.weight"].delta(W, (3, 4), W.dtype)

    with pytest.raises(NumericalError, match="column of zeros"):
        delta(zero)
    if orthogonalised:
        with pytest.raises(NumericalError, match="linearly dependent"):
            delta(twice)
    else:  # a reflection twice is nothing, as PEFT initialises it
        assert float(delta(twice).abs().max()) < 1e-6


def test_a_scale_of_another_length_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, {"q.boft_R": BLOCKS, "q.boft_s": SCALE}, "BOFT")
    with pytest.raises(OrthoMergeError, match="expected 4 columns and 3 rows"):
        updates(source, {"q.weight": torch.ones(5, 4)})
