"""LoRA adapters whose density is counted over the coordinates of the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthomerge.adapters.memory import AdapterState
from orthomerge.errors import BudgetError, OrthoMergeError
from orthomerge.merging.lora.ranks import parse_rank
from orthomerge.merging.plan import MergeRequest
from orthomerge.merging.planning.planner import build_plan
from orthomerge.merging.run import run_plan

SHAPES = {"m.a": (10, 8), "m.b": (10, 8), "m.c": (5, 12)}
LOUDNESS = {"m.a": 1.0, "m.b": 0.1, "m.c": 3.0}
MODEL = {"method": "ties", "scope": "model", "density": 0.3}


def adapter(seed: int, rank: int = 2, modules=SHAPES, dtype=torch.float64, zero: bool = False):
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        B = LOUDNESS[name] * rng.standard_normal((rows, rank))
        A = rng.standard_normal((rank, columns))
        if name in modules:
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_B.weight"] = torch.tensor(B * (not zero)).to(dtype)
            tensors[f"{key}.lora_A.weight"] = torch.tensor(A).to(dtype)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules)}
    return AdapterState(tensors, config, f"a{seed}")


def plan(models, method, weights=None, *, settings=None, **parameters):
    weights = None if weights is None else tuple(weights)
    return build_plan(
        MergeRequest(
            models=tuple(models),
            method=method,
            weights=weights,
            parameters=parameters,
            **(settings or {}),
        )
    )


def merge(*arguments, **options):
    return run_plan(plan(*arguments, **options)).tensors


def change(tensors, name):
    key = f"base_model.model.{name}"
    if f"{key}.lora_B.weight" not in tensors:
        return np.zeros(SHAPES[name])
    B, A = (tensors[f"{key}.lora_{factor}.weight"].double().numpy() for factor in "BA")
    return B @ A


def frames(D, space):
    """Return the left and right frame, as matrices; None for the identity."""

    def span(stack):
        U, s, _ = np.linalg.svd(stack, full_matrices=False)
        return U[:, s > 1e-9 * s[0]]

    if space == "rows":
        return None, span(np.concatenate([each.T for each in D], 1))
    if space == "columns":
        return span(np.concatenate(D, 1)), None
    halves = []
    for each in D:
        U, s, Vh = np.linalg.svd(each, full_matrices=False)
        s = np.where(s > 1e-9 * s[0], s, 0.0)
        halves.append((U * np.sqrt(s), Vh.T * np.sqrt(s)))
    return tuple(span(np.concatenate([half[side] for half in halves], 1)) for side in (0, 1))


def by_hand(models, weights, space, density):
    """Trim with one threshold per model over all coordinates; elect and average per module."""
    U, V, Z = {}, {}, {}
    for name in SHAPES:
        D = [change(model.tensors, name) for model in models]
        left, right = frames(D, space)
        U[name] = np.eye(len(D[0])) if left is None else left
        V[name] = np.eye(D[0].shape[1]) if right is None else right
        Z[name] = [U[name].T @ each @ V[name] for each in D]
    cuts = []
    for at in range(len(models)):
        everything = np.concatenate([np.abs(Z[name][at]).ravel() for name in SHAPES])
        k = max(1, int(density * len(everything) + 1e-9))
        cuts.append(np.sort(everything)[-k])
    merged = {}
    for name, items in Z.items():
        kept = [
            w * np.where(abs(z) >= c, z, 0) for z, c, w in zip(items, cuts, weights, strict=True)
        ]
        sign = np.where(sum(kept) >= 0, 1.0, -1.0)
        agree = [each * sign > 0 for each in kept]
        up = sum(np.where(a, each, 0) for a, each in zip(agree, kept, strict=True))
        down = sum(np.where(a, abs(w), 0) for a, w in zip(agree, weights, strict=True))
        merged[name] = U[name] @ (up / np.where(down > 0, down, 1)) @ V[name].T
    return merged


ROUTES = {
    "columns": ("ties", {"scope": "model", "density": 0.3}),
    "knots": ("knots", {"op": MODEL}),
    "rows": ("knots", {"op": MODEL, "concatenate": "rows"}),
    "core": ("core", {"op": MODEL}),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("workers", [1, 3])
def test_one_threshold_for_the_whole_model(route, workers) -> None:
    models, weights = [adapter(1), adapter(2, 3), adapter(3)], [1.0, -0.5, 2.0]
    name, parameters = ROUTES[route]
    found = merge(models, method=name, weights=weights, settings={"workers": workers}, **parameters)
    space = "columns" if route == "knots" else route
    wanted = by_hand(models, weights, space, 0.3)
    for module in SHAPES:
        np.testing.assert_allclose(change(found, module), wanted[module], atol=1e-9)
    local = {**parameters, **({"op": {**MODEL, "scope": "tensor"}} if "op" in parameters else {})}
    local |= {} if "op" in local else {"scope": "tensor"}
    per_module = merge(models, method=name, weights=weights, **local)
    assert not np.allclose(change(per_module, "m.b"), wanted["m.b"], atol=1e-3)


def test_an_adapter_without_a_module_counts_zeros_there() -> None:
    models = [adapter(1), adapter(2, modules=["m.a", "m.c"])]
    found = merge(models, method="knots", op=MODEL)
    wanted = by_hand(models, [1.0, 1.0], "columns", 0.3)
    for module in SHAPES:
        np.testing.assert_allclose(change(found, module), wanted[module], atol=1e-9)


def test_adapters_of_zeros_give_zeros() -> None:
    found = merge([adapter(1, zero=True), adapter(2, zero=True)], method="knots", op=MODEL)
    assert all(not change(found, name).any() for name in SHAPES)


def test_a_model_of_weight_zero_is_as_if_absent() -> None:
    models = [adapter(1), adapter(2), adapter(3)]
    found = merge(models, method="core", op=MODEL, weights=[1.0, 1.0, 0.0])
    wanted = merge(models[:2], method="core", op=MODEL)
    for name in SHAPES:
        np.testing.assert_allclose(change(found, name), change(wanted, name), atol=1e-9)


def test_the_rank_from_data_sees_the_same_merge() -> None:
    models = [adapter(1), adapter(2)]
    whole = merge(models, method="knots", op=MODEL)
    found = merge(models, method="knots", op=MODEL, settings={"rank": parse_rank("energy:1.0")})
    for name in SHAPES:
        np.testing.assert_allclose(change(found, name), change(whole, name), atol=1e-8)


def test_it_works_onto_a_base() -> None:
    models = [adapter(1), adapter(2)]
    rng = np.random.default_rng(9)
    base = {f"{n}.weight": torch.tensor(rng.standard_normal(shape)) for n, shape in SHAPES.items()}
    found = merge(models, method="knots", op=MODEL, settings={"base": base})
    wanted = by_hand(models, [1.0, 1.0], "columns", 0.3)
    for name in SHAPES:
        update = (found[f"{name}.weight"] - base[f"{name}.weight"]).numpy()
        np.testing.assert_allclose(update, wanted[name], atol=1e-9)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("pico", {"op": MODEL}),
        ("norm-cap", {"op": MODEL}),
        ("pico", {"op": {"method": "knots", "op": MODEL}}),
    ],
)
def test_it_is_refused_where_the_changes_are_changed_first(method, parameters) -> None:
    with pytest.raises(OrthoMergeError, match="scope: model looks at the whole model before"):
        plan([adapter(1), adapter(2)], method=method, **parameters)


@pytest.mark.parametrize(
    ("method", "parameters", "word"),
    [
        ("ties", {"scope": "model", "density": [{"match": "m.a", "value": 0.1}]}, "density"),
        ("knots", {"op": [{"match": "m.a", "value": MODEL}, {"value": "ties"}]}, "density"),
        ("knots", {"op": [{"match": "m.a", "value": MODEL}, {"value": "tsv-m"}]}, "method"),
    ],
)
def test_its_parameters_have_one_value_for_all_modules(method, parameters, word) -> None:
    with pytest.raises(OrthoMergeError, match=f"'{word}' must have one value"):
        plan([adapter(1), adapter(2)], method=method, **parameters)


def test_no_adapter_can_be_left_out_of_a_module() -> None:
    models = [adapter(1), adapter(2, modules=["m.a"])]
    with pytest.raises(OrthoMergeError, match="left out of a module") as caught:
        plan(models, method="knots", op=MODEL, settings={"absent": "skip"})
    assert "--absent zero" in str(caught.value)
    assert plan(models, method="knots", op="ties", settings={"absent": "skip"})


def test_memory_of_the_survey_is_part_of_the_plan() -> None:
    def modules(count):
        tensors = {}
        for at in range(count):
            key = f"base_model.model.m.{at}"
            tensors[f"{key}.lora_B.weight"] = torch.ones(64, 4)
            tensors[f"{key}.lora_A.weight"] = torch.ones(4, 64)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
        return [AdapterState(tensors, config, name) for name in "ab"]

    surveyed = [plan(modules(n), method="knots", op=MODEL).survey_bytes for n in (10, 20)]
    assert surveyed[1] == 2 * surveyed[0]
    assert surveyed[0] == int(0.05 * 10 * 8 * 64) * 4  # 8 ranks, 64 columns, float32
    core = plan(modules(10), method="core", op=MODEL).survey_bytes
    assert core == int(0.05 * 10 * 8 * 8) * 4
    assert plan(modules(10), method="knots").survey_bytes == 0
    many = modules(800)
    with pytest.raises(BudgetError, match="survey of the whole model"):
        plan(many, method="knots", op=MODEL, settings={"memory_budget_bytes": 78_000})
