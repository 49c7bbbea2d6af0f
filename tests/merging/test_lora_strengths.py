"""Magnitudes and biases get the strength that the factors get, whichever method runs inside."""

from __future__ import annotations

import pytest
import torch

import orthomerge
from orthomerge.adapters.memory import AdapterState
from orthomerge.errors import OrthoMergeError
from orthomerge.recipe.run import plan

ROWS, COLUMNS = 12, 8
KEY = "base_model.model.l.q"


def adapter(seed, rank, *, dora=False, bias=False) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        f"{KEY}.lora_A.weight": normal(rank, COLUMNS),
        f"{KEY}.lora_B.weight": normal(ROWS, rank),
    }
    if dora:
        tensors[f"{KEY}.lora_magnitude_vector"] = normal(ROWS).abs() + 2
    if bias:
        tensors[f"{KEY}.lora_B.bias"] = normal(ROWS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "use_dora": dora}
    return AdapterState(tensors, {**config, "lora_bias": bias}, f"adapter {seed}")


W0 = torch.linspace(-1, 1, ROWS * COLUMNS, dtype=torch.float64).reshape(ROWS, COLUMNS) ** 3
BASE = {"l.q.weight": W0, "l.q.bias": torch.ones(ROWS, dtype=torch.float64)}
PLAIN = {"method": "do-merging", "orthogonalise": "none"}
SUM = "task-arithmetic"


def product(one):
    return one.tensors[f"{KEY}.lora_B.weight"] @ one.tensors[f"{KEY}.lora_A.weight"]


def weight_change(one):
    """What a DoRA adapter makes of W0, less W0."""
    V = W0 + product(one)
    return (one.tensors[f"{KEY}.lora_magnitude_vector"] / V.norm(dim=1))[:, None] * V - W0


LINEAR = [
    ({**PLAIN, "scale": 0.3}, 0.3),
    ({**PLAIN, "scale": 0.5, "op": {"method": SUM, "scale": 0.6}}, 0.3),
    ({**PLAIN, "op": "linear"}, 0.5),
    ({"method": "knots", "op": {"method": SUM, "scale": 0.3}}, 0.3),
    ({"method": "core", "op": {"method": SUM, "scale": 0.6, "normalize": True}}, 0.3),
    # These two merge no DoRA adapters:
    ({"method": "norm-cap", "deviations": 1e6, "op": {"method": SUM, "scale": 0.3}}, 0.3),
    ({"method": "norm-cap", "deviations": 1e6, "op": {**PLAIN, "scale": 0.3}}, 0.3),
]


@pytest.mark.parametrize(("settings", "share"), LINEAR[:-2])
def test_dora_has_the_strength_of_the_method_inside(settings, share) -> None:
    adapters = [adapter(1, 2, dora=True), adapter(2, 3, dora=True)]
    found = orthomerge.merge(adapters, base=BASE, **settings).tensors["l.q.weight"]
    wanted = W0 + share * sum(weight_change(one) for one in adapters)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"method": "norm-cap"}, {"method": "do-merging", "op": "norm-cap"}],
    ids=["itself", "nested"],
)
@pytest.mark.parametrize("form", ["full", "dora"])
def test_norm_cap_refuses_what_it_sees_only_in_part(settings, form) -> None:
    """An adapter that only scales the base's rows has factors of norm 0, and may be loud."""
    adapters = [adapter(seed, 2, dora=seed == 3) for seed in (1, 2, 3)]
    with pytest.raises(OrthoMergeError, match=r"norm-cap sees only the low-rank part.*--weight"):
        plan(adapters, base=BASE, output_settings={"form": form}, **settings)
    assert plan(adapters[:2], base=BASE, **settings)


@pytest.mark.parametrize(("settings", "share"), LINEAR)
@pytest.mark.parametrize("matched", [None, 0.5])
def test_biases_have_it_with_a_base_and_without(settings, share, matched) -> None:
    adapters = [adapter(1, 2, bias=True), adapter(2, 3, bias=True)]
    settings = {**settings, "norm_matched": matched}
    if matched is not None:  # what is added to the weights has this norm, whatever λ is
        share = 0.5
    total = share * sum(one.tensors[f"{KEY}.lora_B.bias"] for one in adapters)
    alone = orthomerge.merge(adapters, **settings).tensors[f"{KEY}.lora_B.bias"]
    onto = orthomerge.merge(adapters, base=BASE, **settings).tensors["l.q.bias"]
    torch.testing.assert_close(alone, total, rtol=0, atol=1e-12)
    torch.testing.assert_close(onto, 1 + total, rtol=0, atol=1e-12)


def test_biases_follow_a_measured_scale_in_an_adapter() -> None:
    """Equal adapters: λ is 1/2, and the result is each of them."""
    one = adapter(1, 2, bias=True)
    merged = orthomerge.merge([one, one], scale="auto", decouple_strength=1.0).tensors
    torch.testing.assert_close(
        merged[f"{KEY}.lora_B.bias"], one.tensors[f"{KEY}.lora_B.bias"], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"method": "do-merging", "scale": "auto"}, "bias", "biases need the method's scale"),
        ({"method": "pico", "op": {**PLAIN, "scale": "auto"}}, "bias", "nested method's scale"),
        ({"method": "pico", "op": {**PLAIN, "scale": "auto"}}, "dora", "nested method's scale"),
    ],
)
def test_what_only_the_factors_can_tell_is_refused(settings, kind, words) -> None:
    adapters = [adapter(seed, 2, **{kind: True}) for seed in (1, 2)]
    with pytest.raises(OrthoMergeError, match=words):
        plan(adapters, base=BASE, **settings)


@pytest.mark.parametrize("outer", ["knots", "core", "pico", "norm-cap", "do-merging"])
def test_weights_that_cancel_are_refused_for_a_mean_inside(outer) -> None:
    adapters = [adapter(1, 2), adapter(2, 2)]
    op = {"method": SUM, "normalize": True}
    with pytest.raises(OrthoMergeError, match="sum to zero and task-arithmetic divides"):
        plan(adapters, method=outer, op=op, weights=[1.0, -1.0])


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "della", "density": 0.95},
        {"method": "knots", "op": {"method": "della", "density": 0.95}},
    ],
)
def test_settings_that_make_no_probabilities_are_refused_in_the_plan(settings) -> None:
    with pytest.raises(OrthoMergeError, match="must be probabilities"):
        plan([adapter(1, 2), adapter(2, 2)], **settings)


@pytest.mark.parametrize("outer", ["do-merging", "knots", "core", "pico", "norm-cap"])
def test_a_model_that_takes_no_part_leaves_the_others_their_random_numbers(outer) -> None:
    first, second, third = (adapter(seed, 2) for seed in (1, 2, 3))
    settings = {"method": outer, "op": "dare"}
    three = orthomerge.merge([first, second, third], weights=[1.0, 0.0, 1.0], **settings).adapter
    two = orthomerge.merge([first, third], **settings).adapter
    torch.testing.assert_close(product(three), product(two), rtol=0, atol=1e-12)


@pytest.mark.parametrize("outer", ["do-merging", "pico", "norm-cap"])
def test_a_change_of_zero_counts_in_a_mean(outer) -> None:
    """As it does in a mean of full weights."""
    nothing = adapter(2, 2)
    nothing.tensors[f"{KEY}.lora_B.weight"].zero_()
    merged = orthomerge.merge([adapter(1, 2), nothing], method=outer, op="linear").adapter
    torch.testing.assert_close(product(merged), product(adapter(1, 2)) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("form", ["full", "dora"])
def test_a_norm_matched_strength_counts_what_magnitudes_do(form, turned) -> None:
    """Also of layers that store the transposed weight."""
    adapters = [adapter(1, 2, dora=True), adapter(2, 3, dora=True)]
    for one in adapters:
        one.config["fan_in_fan_out"] = turned
    base = {"l.q.weight": W0.T.contiguous() if turned else W0}
    size = sum(weight_change(one) for one in adapters).norm()
    merged = orthomerge.merge(adapters, base=base, norm_matched=0.5, output_settings={"form": form})
    if form == "full":
        found = merged.tensors["l.q.weight"] - base["l.q.weight"]
    else:
        found = weight_change(merged.adapter)
    torch.testing.assert_close(found.norm(), 0.5 * size, rtol=1e-9, atol=0)
