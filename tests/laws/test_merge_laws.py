"""One conformance suite for all merge methods, through the engine, parametrised by the registry.

A method declares in its registration which laws hold at its default parameters.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import orthomerge
from orthomerge.errors import NumericalError
from orthomerge.merging import registry
from orthomerge.merging.plan import MergeRequest
from orthomerge.merging.planning.planner import build_plan
from orthomerge.merging.registry import all_methods
from orthomerge.merging.run import run_plan
from orthomerge.merging.spaces import Space

METHODS = all_methods()
DENSE = [m for m in METHODS.values() if m.space in (Space.WEIGHT, Space.DELTA)]
SHAPES = {
    "vector": (7,),
    "one": (1, 1),
    "scalar": (),
    "tall": (40, 3),
    "wide": (3, 40),
    "batch": (2, 5, 4),
    "conv": (4, 3, 3, 3),
    "empty": (0, 4),
}


def having(law):
    return pytest.mark.parametrize(
        "method", [m for m in DENSE if law in m.laws], ids=lambda method: method.name
    )


every_method = pytest.mark.parametrize("method", DENSE, ids=lambda method: method.name)


def model(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in SHAPES.items()
    }


def run(method, models, base=None, weights=None, **settings):
    if base is None and method.needs_base:
        base = model(99, next(iter(models[0].values())).dtype)
    request = MergeRequest(
        models=tuple(models),
        base=base if method.needs_base else None,
        method=method.name,
        weights=weights,
        **settings,
    )
    return run_plan(build_plan(request)).tensors


def models_for(method, count: int = 3, **options):
    count = min(count, method.max_models or count)
    return [model(seed, **options) for seed in range(1, count + 1)]


def assert_close(found, wanted, tolerance: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)


@having("identity")
def test_one_model_at_weight_one_is_itself(method) -> None:
    only = model(1)
    assert_close(run(method, [only]), only)


@having("idempotent")
def test_identical_models_are_themselves(method) -> None:
    only = model(1)
    count = method.max_models or 3
    assert_close(run(method, [only] * count), only)


@having("permutation")
def test_order_of_models_does_not_matter(method) -> None:
    models = models_for(method)
    assert_close(run(method, models), run(method, models[::-1]))


@having("scale-equivariance")
def test_scaling_all_inputs_scales_the_output(method) -> None:
    models, base = models_for(method), model(99)
    scaled = [{name: 4.0 * value for name, value in m.items()} for m in models]
    wanted = {n: 4.0 * v for n, v in run(method, models, base).items()}
    assert_close(run(method, scaled, {n: 4.0 * v for n, v in base.items()}), wanted, 1e-5)


def other_settings(method):
    """Return the defaults, and each choice and switch of a method in its other positions."""
    settings = [{}]
    for key, parameter in method.parameters.items():
        others = parameter.choices or ((True, False) if parameter.kind is bool else ())
        settings += [{key: value} for value in others if value != parameter.default]
    return settings


def update_from(method, seed: int, **parameters):
    """Return W - W_0 for changes that a base of this seed can take up without rounding."""
    steps = 2.0**20

    def exact(seed: int, bound: float):
        raw = model(seed, torch.float64)
        return {n: (v.clamp(-bound, bound) * steps).round() / steps for n, v in raw.items()}

    base, changes = exact(seed, 8.0), [exact(at, 4.0) for at in (1, 2, 3)]
    models = [{n: base[n] + change[n] for n in base} for change in changes]
    merged = run(method, models, base, parameters=parameters)
    return {n: merged[n] - base[n] for n in base}


def assert_additive(method) -> None:
    for parameters in other_settings(method):
        one, other = (update_from(method, seed, **parameters) for seed in (98, 99))
        assert_close(one, other, 1e-12)
        assert any(value.any() for value in one.values())


@having("additive")
def test_the_update_does_not_depend_on_the_base(method) -> None:
    assert_additive(method)


def test_a_method_that_rotates_the_base_is_not_additive() -> None:
    """The law can fail: here it does."""
    with pytest.raises(AssertionError):
        assert_close(
            *(update_from(METHODS["orthomerge-decoupled"], seed, gate="off") for seed in (98, 99)),
            1e-3,
        )


def test_only_methods_of_task_vectors_claim_to_be_additive() -> None:
    assert all(m.space is Space.DELTA for m in METHODS.values() if "additive" in m.laws)


@pytest.mark.parametrize(  # methods of factors: test_lora_laws.py
    "method", [m for m in METHODS.values() if m.space is not Space.FACTORS], ids=lambda m: m.name
)
def test_the_function_does_not_change_its_inputs(method, monkeypatch) -> None:
    """Spy on the tensors that the engine hands to the pure function."""
    if method.space is Space.ROTATION:
        inputs = [torch.tensor([[[0.0, a], [-a, 0.0]]]) for a in (0.1, 0.3)]
        copies = [tensor.clone() for tensor in inputs]
        method.function(inputs, weights=[1.0, 2.0])
        assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
        return
    calls = []

    def spy(*arguments, **settings):
        tensors = [t for a in arguments for t in ([a] if isinstance(a, torch.Tensor) else a)]
        copies = [tensor.clone() for tensor in tensors]
        result = method.function(*arguments, **settings)
        calls.append(all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True)))
        return result

    watched = dataclasses.replace(method, function=functools.wraps(method.function)(spy))
    monkeypatch.setitem(registry._REGISTRY, method.name, watched)
    settings = {"parameters": {"scale": 0.5}} if "scale" in method.parameters else {}
    run(method, models_for(method), **settings)
    assert calls
    assert all(calls)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_agree_with_fp64_up_to_one_rounding(method, dtype) -> None:
    base = model(99, dtype)
    models = models_for(method, dtype=dtype)
    if method.nests:  # what is rotated is decided, so models that have nothing in common may flip
        models = [{n: (base[n] + v / 8).to(dtype) for n, v in m.items()} for m in models]
    found = run(method, models, base)
    exact = run(
        method,
        [{n: v.double() for n, v in m.items()} for m in models],
        {n: v.double() for n, v in base.items()},
    )
    for name, value in found.items():
        assert value.dtype == dtype
        step = torch.finfo(dtype).eps * exact[name].abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((value.double() - exact[name]).abs() <= 0.51 * step + 3e-6).all()


@every_method
def test_result_does_not_depend_on_threads(method) -> None:
    models, base = models_for(method), model(99)
    one, four = (run(method, models, base, workers=n) for n in (1, 4))
    assert all(torch.equal(one[name], four[name]) for name in one)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, -1])
def test_non_finite_input_is_refused_by_name(method, bad, position) -> None:
    models = models_for(method)
    models[position]["tall"][7, 1] = bad
    with pytest.raises(NumericalError, match="tall"):
        run(method, models)


@every_method
def test_non_finite_base_is_refused_by_name(method) -> None:
    if not method.needs_base:
        pytest.skip("the method takes no base")
    base = model(99)
    base["wide"][0, 0] = float("nan")
    with pytest.raises(NumericalError, match="wide"):
        run(method, models_for(method), base)


@every_method
def test_overflow_of_the_output_dtype_is_refused(method) -> None:
    huge = [{n: v * 0 + 7e4 for n, v in m.items()} for m in models_for(method)]
    with pytest.raises(NumericalError, match="merged tensor"):
        run(method, huge, dtype="float16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_method
def test_cuda_agrees_with_cpu(method) -> None:
    models, base = models_for(method), model(99)
    assert_close(run(method, models, base, device="cuda"), run(method, models, base), 1e-5)


def test_the_suite_sees_every_dense_method() -> None:
    assert {"linear", "slerp", "task-arithmetic", "ties", "passthrough"} <= {m.name for m in DENSE}
    assert orthomerge.Space.ROTATION in {m.space for m in METHODS.values()}
