"""One conformance suite for all methods that merge LoRA adapters, through the engine.

Parametrised by the registry: methods of factors, methods with a face for them, and those of task
vectors that do not look at the base. Changes are compared, never factors: those are not unique.
"""

from __future__ import annotations

import pytest
import torch

from orthomerge.adapters.memory import AdapterState
from orthomerge.errors import NumericalError
from orthomerge.linalg.factors import Factors
from orthomerge.merging.draws import Draws
from orthomerge.merging.lora.lifting import merge_factors
from orthomerge.merging.plan import MergeRequest
from orthomerge.merging.planning.planner import build_plan
from orthomerge.merging.registry import all_methods
from orthomerge.merging.run import run_plan
from orthomerge.merging.spaces import Space

MODULES = {"enc.q": (12, 10), "enc.k": (12, 10), "enc.up": (9, 14)}
METHODS = [
    method
    for method in all_methods().values()
    if method.factors is not None or (method.space is Space.DELTA and "additive" in method.laws)
]
#: Methods to which an adapter that changes nothing is a task like any other, and why.
COUNTS_ZEROS = {
    "linear": "the mean is over all models",
    "peft-linear": "its A meets the others' B",
}


def having(law):
    return these(m for m in METHODS if law in m.laws)


def these(methods):
    return pytest.mark.parametrize("method", list(methods), ids=lambda method: method.name)


every_method = these(METHODS)
of_several = these(m for m in METHODS if m.max_models is None)


def adapter(seed: int, rank: int, *, dtype=torch.float64, scale: float = 1.0, modules=MODULES):
    """Return an adapter with random factors, alpha = 6; ``scale`` multiplies its changes."""
    tensors = {}
    for name, (rows, columns) in modules.items():
        generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, name)))
        prefix = f"base_model.model.{name}"
        B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        tensors[f"{prefix}.lora_B.weight"] = (scale * B).to(dtype)
        tensors[f"{prefix}.lora_A.weight"] = A.to(dtype)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": "base"}
    return AdapterState(tensors, {**config, "target_modules": list(modules)}, f"a{seed}")


def adapters(method, ranks=(2, 3, 4), **options):
    if method.unfit_ranks is not None:
        ranks = [3] * len(ranks)
    ranks = ranks[: method.max_models]
    return [adapter(seed, rank, **options) for seed, rank in enumerate(ranks, start=1)]


def changes(tensors, factor=1.0):
    """Return B A of every module of a written adapter, whose own scale is 1."""
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    pairs = {n: (tensors[f"{n}.lora_B.weight"], tensors[f"{n}.lora_A.weight"]) for n in names}
    return {n: factor * (B.double() @ A.double()) for n, (B, A) in pairs.items()}


def own_change(state):
    return changes(state.tensors, 6 / state.config["r"])


def merged(method, models, weights=None, *, run=None, **parameters):
    """Return the merged changes; float64 in, float64 throughout."""
    return changes(written(method, models, weights, run=run, **parameters))


def written(method, models, weights=None, *, run=None, **parameters):
    request = MergeRequest(
        models=tuple(models),
        method=method.name,
        weights=tuple(weights) if weights and method.uses_weights else None,
        parameters=parameters,
        **(run or {}),
    )
    return run_plan(build_plan(request)).tensors


def assert_close(found, wanted, tolerance=1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        error = torch.linalg.matrix_norm(found[name] - change)
        assert error <= tolerance * torch.linalg.matrix_norm(change), name
        assert change.any()


@having("identity")
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_one_adapter_at_weight_one_is_itself(method, rank) -> None:
    only = adapter(1, rank)
    assert_close(merged(method, [only], [1.0]), own_change(only))


def keeping_all(method):
    """Return the settings at which nothing is dropped, of methods that drop; else None."""
    if "density" in method.parameters:
        others = {"epsilon": 0.0} if "epsilon" in method.parameters else {}
        return {"density": 1.0, **others}
    return None


@these(m for m in METHODS if keeping_all(m))
@pytest.mark.parametrize("outer", [None, "knots", "core", "pico", "norm-cap"])
def test_one_adapter_is_itself_where_nothing_is_dropped(method, outer) -> None:
    only, settings = adapter(1, 3), keeping_all(method)
    if outer is not None:
        method, settings = all_methods()[outer], {"op": {"method": method.name, **settings}}
    assert_close(merged(method, [only], [1.0], **settings), own_change(only))


@having("permutation")
def test_order_of_adapters_does_not_matter(method) -> None:
    models, weights = adapters(method), [1.0, 0.5, 2.0]
    turned = merged(method, models[::-1], weights[::-1])
    assert_close(turned, merged(method, models, weights))


@having("scale-equivariance")
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_all_changes_scales_the_result(method, scale) -> None:
    wanted = merged(method, adapters(method))
    found = merged(method, adapters(method, scale=scale))
    assert_close(found, {n: scale * change for n, change in wanted.items()})


@every_method
def test_a_module_is_merged_as_if_it_were_alone(method) -> None:
    """Two modules of one shape may be merged as one batch, the third never with them."""
    together = written(method, adapters(method))
    for name, shape in MODULES.items():
        alone = written(method, adapters(method, modules={name: shape}))
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-10, atol=1e-12)


@these(m for m in METHODS if m.batched)
def test_a_batch_is_merged_as_its_items(method) -> None:
    parts = factors_of(method, batch=3)
    settings = {key: p.check(p.default) for key, p in method.parameters.items()}
    given = {"weights": [1.0, 0.5, 2.0][: len(parts)], **settings}
    together = merge_factors(method, parts, **given).tensor.dense()
    for at in range(3):
        items = [Factors(part.B[at], part.A[at]) for part in parts]
        alone = merge_factors(method, items, **given).tensor.dense()
        torch.testing.assert_close(together[at], alone, rtol=1e-10, atol=1e-12)


def factors_of(method, batch=None):
    torch.manual_seed(0)
    ranks = ([3] * 3 if method.unfit_ranks is not None else [2, 3, 4])[: method.max_models]
    lead = () if batch is None else (batch,)

    def draw(*shape):
        return torch.randn(*lead, *shape, dtype=torch.float64)

    return [Factors(draw(8, rank), draw(rank, 6)) for rank in ranks]


@every_method
def test_the_function_does_not_change_its_inputs(method) -> None:
    parts = factors_of(method)
    copies = [Factors(part.B.clone(), part.A.clone()) for part in parts]
    settings = {key: p.check(p.default) for key, p in method.parameters.items()}
    draws = Draws(0, method.name, "w", ["a", "b", "c"])
    merge_factors(method, parts, weights=[1.0, 0.5, 2.0][: len(parts)], draws=draws, **settings)
    for part, copy in zip(parts, copies, strict=True):
        assert torch.equal(part.B, copy.B)
        assert torch.equal(part.A, copy.A)


@of_several
@pytest.mark.parametrize("ranks", [(2, 3), (8, 9)])
def test_the_result_has_no_more_ranks_than_the_adapters(method, ranks) -> None:
    found = written(method, adapters(method, ranks))
    total = sum(ranks) if method.unfit_ranks is None else 3
    for name, (rows, columns) in MODULES.items():
        A = found[f"base_model.model.{name}.lora_A.weight"]
        assert len(A) == min(total, rows, columns)
        assert torch.isfinite(A).all()


@of_several
def test_an_adapter_of_zeros_is_as_if_absent(method) -> None:
    models = adapters(method)
    zero = adapter(4, 3, scale=0.0)
    found, wanted = merged(method, [*models, zero]), merged(method, models)
    if method.name in COUNTS_ZEROS:
        with pytest.raises(AssertionError):
            assert_close(found, wanted)
    else:
        assert_close(found, wanted)


@of_several
def test_an_adapter_of_weight_zero_is_as_if_absent(method) -> None:
    models = adapters(method)
    loud = adapter(4, 3, scale=100.0)
    found = merged(method, [*models, loud], [1.0, 0.5, 2.0, 0.0])
    assert_close(found, merged(method, models, [1.0, 0.5, 2.0]))


@every_method
def test_adapters_of_zeros_alone_give_zeros(method) -> None:
    found = merged(method, adapters(method, scale=0.0))
    assert all(not change.any() for change in found.values())
    assert len(found) == len(MODULES)


@every_method
def test_single_precision_agrees_with_double(method) -> None:
    models = adapters(method, dtype=torch.float32)
    exact = merged(method, models, run={"compute_dtype": "float64"})
    assert_close(merged(method, models), exact, 1e-4)


@every_method
def test_half_precision_is_lifted(method) -> None:
    """What is computed from bfloat16 factors is what is computed from their values."""
    halves = adapters(method, dtype=torch.bfloat16)
    lifted = [
        AdapterState({k: v.float() for k, v in m.tensors.items()}, m.config, m.name) for m in halves
    ]
    found = written(method, halves)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert_close(changes(found), merged(method, lifted), 0.02)


@every_method
def test_the_result_does_not_depend_on_threads_or_runs(method) -> None:
    models = adapters(method)
    one, four, again = (written(method, models, run={"workers": n}) for n in (1, 4, 1))
    for name in one:
        assert torch.equal(one[name], four[name])
        assert torch.equal(one[name], again[name])


@pytest.mark.parametrize("outer", [None, "knots", "core", "pico", "norm-cap"])
@pytest.mark.parametrize("name", ["dare", "dare-ties", "della"])
def test_only_the_seed_decides_what_is_drawn(name, outer) -> None:
    method = all_methods()[outer or name]
    settings = {} if outer is None else {"op": name}
    models = [adapter(seed, 3) for seed in (1, 2)]
    one, four, other = (
        written(method, models, run={"workers": workers, "seed": seed}, **settings)
        for workers, seed in [(1, 0), (4, 0), (1, 1)]
    )
    assert all(torch.equal(one[key], four[key]) for key in one)
    found, different = changes(one), changes(other)
    for module in found:
        assert not torch.allclose(found[module], different[module])
    if outer in (None, "knots"):  # the same draws, in the same coordinates
        plain = changes(written(all_methods()[name], models, run={"seed": 0}))
        assert_close(found, plain)


@of_several
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_non_finite_input_is_refused_by_name(method, factor) -> None:
    models = adapters(method)
    models[1].tensors[f"base_model.model.enc.k.{factor}.weight"][1, 2] = float("nan")
    with pytest.raises(NumericalError, match=r"enc\.k"):
        written(method, models)


def test_the_suite_sees_every_kind_of_method() -> None:
    names = {method.name for method in METHODS}
    assert {"task-arithmetic", "ties", "dare", "iso-c", "knots", "core", "pico"} <= names
    assert "orthomerge-decoupled" not in names
