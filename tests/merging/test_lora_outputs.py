"""LoRA adapters in, one adapter out: ranks, dtypes, heads, absent modules, against dense fp64."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lora_folders import PREFIX, SHAPES, assert_changes, factors, read, write
from safetensors.torch import load_file

import orthomerge
from orthomerge.errors import AdapterError, RecipeError
from orthomerge.merging.executors.onto_base import merged_scales
from orthomerge.merging.lora.ranks import RankRule
from orthomerge.merging.registry import all_methods


def ranks(folder):
    stored = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): len(value)
        for key, value in stored.items()
        if key.endswith("lora_A.weight")
    }


@pytest.fixture
def pair(tmp_path):
    """Two adapters of ranks 3 and 2, and the dense sum of their changes at weights 0.5 and 2."""
    first = write(tmp_path / "first", factors(1))
    second = write(tmp_path / "second", factors(2, rank=2, alpha=1.0))
    return {name: 0.5 * first[name] + 2.0 * second[name] for name in first}


def summed(tmp_path, **settings):
    output = tmp_path / "out"
    shutil.rmtree(output, ignore_errors=True)
    orthomerge.merge(
        [tmp_path / "first", tmp_path / "second"],
        method="task-arithmetic",
        weights=[0.5, 2.0],
        output=output,
        **settings,
    )
    return output


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 9])
def test_a_rank_is_the_truncated_svd(tmp_path, pair, rank) -> None:
    """Eckart and Young: the error is that of the singular values cut off, and no less."""
    output = summed(tmp_path, output_settings={"rank": rank})
    assert ranks(output) == dict.fromkeys(SHAPES, min(rank, 5))
    for name, change in read(output).items():
        U, S, Vh = torch.linalg.svd(pair[name], full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(change, best, atol=1e-12, rtol=0)
        error = torch.linalg.vector_norm(change - pair[name])
        torch.testing.assert_close(error, torch.linalg.vector_norm(S[rank:]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999, 1])
def test_an_energy_is_kept_by_the_smallest_rank(tmp_path, pair, share) -> None:
    output = summed(tmp_path, output_settings={"rank": f"energy:{share}"})
    for name, rank in ranks(output).items():
        energies = torch.linalg.svdvals(pair[name]).square()[:5]
        kept = energies.cumsum(0) / energies.sum()
        assert kept[rank - 1] >= share - 1e-9, name
        assert rank == 1 or kept[rank - 2] < share, name
    kept = sum(float(change.square().sum()) for change in read(output).values())
    assert kept >= (share - 1e-9) * sum(float(change.square().sum()) for change in pair.values())


@pytest.mark.parametrize("uniform", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("spare", [0, 31])
def test_parameters_are_not_exceeded_and_well_spent(tmp_path, pair, uniform, spare) -> None:
    """Never more than asked for, and never worse than one rank for all of the same size."""
    budget = uniform * sum(map(sum, SHAPES.values())) + spare
    output = summed(tmp_path, output_settings={"rank": f"parameters:{budget}"})
    stored = load_file(output / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) <= budget
    found = read(output)
    error = sum(float((found[name] - pair[name]).square().sum()) for name in SHAPES)
    cut = [torch.linalg.svdvals(pair[name])[uniform:].square().sum() for name in SHAPES]
    assert error <= float(sum(cut)) + 1e-12


def test_too_few_parameters_are_refused(tmp_path, pair) -> None:
    least = sum(map(sum, SHAPES.values()))
    with pytest.raises(RecipeError, match=f"parameters:{least} or more"):
        summed(tmp_path, output_settings={"rank": f"parameters:{least - 1}"})
    assert not (tmp_path / "out").exists()


spectra = st.lists(
    st.tuples(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5), st.integers(1, 30)),
    min_size=1,
    max_size=5,
)


@given(spectra, st.integers(1, 5), st.integers(0, 40))
@example([([4.0, 3.0], 10), ([2.0, 1.05, 1.02], 1)], 2, 0)  # cheap ranks leave no room for 3.0
def test_budgets_are_never_worse_spent_than_evenly(found, uniform, spare) -> None:
    values = {str(at): sorted(s, reverse=True) for at, (s, _) in enumerate(found)}
    costs = {str(at): cost for at, (_, cost) in enumerate(found)}
    even = {name: min(uniform, len(values[name])) for name in values}
    budget = sum(costs[name] * rank for name, rank in even.items()) + spare
    chosen = RankRule("parameters", budget).ranks(values, costs)

    def energy(ranks):
        return sum(v**2 for name, rank in ranks.items() for v in values[name][:rank])

    assert sum(costs[name] * rank for name, rank in chosen.items()) <= budget
    assert all(1 <= rank <= len(values[name]) for name, rank in chosen.items())
    assert energy(chosen) >= energy(even) * (1 - 1e-12)


@pytest.mark.parametrize("rank", [None, 3])
def test_bfloat16_is_rounded_once(tmp_path, pair, rank) -> None:
    """Each factor is off by half a unit in the last of 8 bits: |E| <= (2 u + u^2) |B| |A|."""
    exact = load_file(
        summed(tmp_path, output_settings={"rank": rank}) / "adapter_model.safetensors"
    )
    settings = {"rank": rank, "dtype": "bfloat16"}
    output = summed(tmp_path, output_settings=settings)
    rounded = load_file(output / "adapter_model.safetensors")
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}
    u = 2.0**-8
    for name, change in read(output).items():
        B, A = (exact[f"{PREFIX}{name}.lora_{f}.weight"] for f in "BA")
        bound = (2 * u + u**2) * B.abs() @ A.abs()
        error = (change - B @ A).abs()
        assert bool((error <= bound).all())
        assert float(error.max()) > 0


def test_half_precision_adapters_keep_their_dtype_and_are_lifted(tmp_path) -> None:
    """bfloat16 in: float32 arithmetic if asked for float32, and bfloat16 out otherwise."""
    wanted = write(tmp_path / "first", factors(1), dtype=torch.bfloat16)
    settings = {"method": "linear", "output_settings": {"dtype": "float32"}}
    orthomerge.merge([tmp_path / "first"], output=tmp_path / "out", **settings)
    assert_changes(read(tmp_path / "out"), wanted, 1e-5)
    orthomerge.merge([tmp_path / "first"], method="linear", output=tmp_path / "same")
    stored = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


HEAD, NORM = "head.weight", "norm.bias"


@pytest.fixture
def heads(tmp_path):
    """Two adapters with trained heads, of which the second has a norm of its own."""
    one = {HEAD: torch.full((2, 2), 1.0)}
    two = {HEAD: torch.full((2, 2), 5.0), NORM: torch.full((3,), 7.0)}
    for name, seed, whole in (("first", 1, one), ("second", 2, two)):
        write(tmp_path / name, factors(seed), whole=whole, modules_to_save=["head", "norm"])


@pytest.mark.usefixtures("heads")
@pytest.mark.parametrize(("choice", "head"), [("average", 4.2), ("keep:1", 1.0), ("keep:2", 5.0)])
def test_heads(tmp_path, choice, head) -> None:
    """Averaged by the weights 0.5 and 2, or one of them; what only one has is taken over."""
    found = read(summed(tmp_path, adapter_settings={"heads": choice}))
    torch.testing.assert_close(found[HEAD], torch.full((2, 2), head))
    torch.testing.assert_close(found[NORM], torch.full((3,), 7.0))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head", "norm"]


@pytest.mark.usefixtures("heads")
def test_heads_can_be_refused(tmp_path) -> None:
    with pytest.raises(AdapterError, match=r"head\.weight.*--heads keep:N"):
        summed(tmp_path, adapter_settings={"heads": "error"})
    with pytest.raises(RecipeError, match="keep:N names a model by its place"):
        summed(tmp_path, adapter_settings={"heads": "keep:3"})


def test_heads_of_different_shapes_need_a_choice(tmp_path) -> None:
    for name, seed, classes in (("first", 1, 2), ("second", 2, 3)):
        whole = {HEAD: torch.full((classes, 2), float(seed))}
        write(tmp_path / name, factors(seed), whole=whole, modules_to_save=["head"])
    with pytest.raises(AdapterError, match=r"cannot be averaged.*keep:N"):
        summed(tmp_path)
    found = read(summed(tmp_path, adapter_settings={"heads": "keep:2"}))
    torch.testing.assert_close(found[HEAD], torch.full((3, 2), 2.0))


@pytest.mark.parametrize(("absent", "divisor"), [("zero", 4.0), ("skip", 1.0)])
def test_absent_modules(tmp_path, absent, divisor) -> None:
    """The mean at weights 1 and 3: a module of the first alone is 1/4 of its change, or all."""
    first = write(tmp_path / "first", factors(1))
    second = write(tmp_path / "second", factors(2, names=("a.q", "b.down")))
    orthomerge.merge(
        [tmp_path / "first", tmp_path / "second"],
        method="linear",
        weights=[1.0, 3.0],
        output=tmp_path / "out",
        adapter_settings={"absent": absent},
    )
    wanted = {name: (first[name] + 3 * second[name]) / 4 for name in second}
    assert_changes(read(tmp_path / "out"), wanted | {"a.v": first["a.v"] / divisor})


def test_absent_modules_can_be_refused(tmp_path) -> None:
    write(tmp_path / "first", factors(1))
    write(tmp_path / "second", factors(2, names=("a.q", "b.down")))
    with pytest.raises(RecipeError, match=r"a\.v.*1 of 3 modules are not in every adapter"):
        summed(tmp_path, adapter_settings={"absent": "error"})


def test_bases_must_be_one_unless_they_are_said_to_be(tmp_path, pair) -> None:
    write(tmp_path / "second", factors(2, rank=2, alpha=1.0), base_model_name_or_path="org/other")
    with pytest.raises(AdapterError, match=r"different base models.*--assume-same-base"):
        summed(tmp_path)
    found = read(summed(tmp_path, adapter_settings={"assume_same_base": True}))
    assert_changes(found, pair)
    write(tmp_path / "second", factors(2, rank=2, alpha=1.0), base_model_name_or_path="/x/Base/")
    assert_changes(read(summed(tmp_path)), pair)  # the same model, in a folder


@pytest.mark.parametrize(
    ("method", "share", "settings"),
    [
        ("task-arithmetic", 1.0, {}),
        ("task-arithmetic", 0.5, {"scale": 0.5}),
        ("linear", 0.25, {}),
        ("linear", 1.0, {"normalize": False}),
        ("task-arithmetic", 0.25, {"normalize": True}),
    ],
)
def test_biases_are_merged_as_the_weights_are(tmp_path, method, share, settings) -> None:
    """Trained biases get the factor alpha / r of their adapter, and the method's own weights."""
    ones = {name: torch.ones(shape[0], dtype=torch.float64) for name, shape in SHAPES.items()}
    fives = {name: 5 * one for name, one in ones.items()}
    first = write(tmp_path / "first", factors(1), biases=ones)  # scale 6 / 3
    second = write(tmp_path / "second", factors(2, rank=2, alpha=1.0), biases=fives)  # 1 / 2
    folders = [tmp_path / "first", tmp_path / "second"]
    options = {"weights": [1.0, 3.0], "output": tmp_path / "out", **settings}
    orthomerge.merge(folders, method=method, **options)
    wanted = {name: share * (first[name] + 3 * second[name]) for name in first}
    wanted |= {f"{n}.lora_B.bias": share * (2 + 3 * 2.5) * one for n, one in ones.items()}
    assert_changes(read(tmp_path / "out"), wanted)


def test_biases_follow_a_method_of_task_vectors(tmp_path) -> None:
    """TIES at density 1: signs elected on 2 and -7.5; a model without the module takes no part."""
    ones = {name: torch.ones(shape[0], dtype=torch.float64) for name, shape in SHAPES.items()}
    threes = {name: -3 * one for name, one in ones.items()}
    write(tmp_path / "first", factors(1), biases=ones)
    write(tmp_path / "second", factors(2, names=("a.q",)), biases=threes)
    orthomerge.merge(
        [tmp_path / "first", tmp_path / "second"],
        method="ties",
        density=1.0,
        output=tmp_path / "out",
        adapter_settings={"absent": "skip"},
    )
    found = read(tmp_path / "out")
    torch.testing.assert_close(found["a.q.lora_B.bias"], -6.0 * ones["a.q"])
    torch.testing.assert_close(found["a.v.lora_B.bias"], 2.0 * ones["a.v"])


@pytest.mark.parametrize(
    ("name", "normalize", "weights", "share"),
    [
        ("ties", True, [1.0, -1.0], 0.5),  # what agrees is divided by the sizes of its weights
        ("ties", False, [1.0, -1.0], 1.0),
        ("ties", True, [0.0, 0.0], 1.0),
        ("task-arithmetic", True, [1.0, 3.0], 0.25),
        ("linear", True, [3.0, -1.0], 0.5),
    ],
)
def test_magnitudes_are_averaged_by_what_the_method_divides_by(
    name, normalize, weights, share
) -> None:
    """Also where the weights sum to zero and no sum of them is asked for."""
    method, parameters = all_methods()[name], {"scale": 2.0, "normalize": normalize}
    diagonals = [torch.tensor([2.0, 1.0]), None]
    found = merged_scales(method, diagonals, weights, parameters, {}, 1.0)
    wanted = torch.tensor([1 + 2 * share * weights[0], 1.0])
    torch.testing.assert_close(found, wanted)
    assert merged_scales(method, [None, None], weights, parameters, {}, 1.0) is None
