"""Every dense method against an independent fp64 oracle, bit for bit after one rounding.

The oracles are written from the formulas with numpy; they share no code with the library.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orthomerge import merge

SHAPE = (64, 48)
WEIGHTS = [0.5, 1.5, 0.75]


def models(count: int, seed: int = 0, spread: float = 0.05):
    """Return (base, fine-tunes) in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SHAPE, generator=generator)
    tuned = [base + spread * torch.randn(SHAPE, generator=generator) for _ in range(count)]
    return base.bfloat16(), [t.bfloat16() for t in tuned]


def fp64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def merged(base, tuned, method, weights=None, **parameters):
    result = merge(
        [{"w": t} for t in tuned],
        base=None if base is None else {"w": base},
        method=method,
        weights=weights,
        **parameters,
    )
    return result.tensors["w"]


def assert_rounded_once(found: torch.Tensor, exact: np.ndarray) -> None:
    """Equal to the exact value's nearest bf16, or to its neighbour where the exact value lies
    within fp32 rounding of the middle between the two."""
    wanted = torch.from_numpy(exact).to(torch.bfloat16)
    differs = found != wanted
    assert differs.double().mean() < 0.02
    middle = (fp64(found) + fp64(wanted)) / 2
    slack = 4e-7 * (np.abs(exact) + 1)
    assert (np.abs(exact - middle) <= slack)[differs.numpy()].all()


def trimmed_deltas(base, tuned, density):
    trimmed = []
    for delta in [(fp64(t) - fp64(base)).astype(np.float32) for t in tuned]:
        keep = max(1, math.floor(density * delta.size + 1e-9))
        threshold = np.sort(np.abs(delta).ravel())[-keep]
        trimmed.append(np.where(np.abs(delta) >= threshold, delta, 0).astype(np.float64))
    return trimmed


def ties_oracle(base, tuned, weights, density, scale):
    trimmed = trimmed_deltas(base, tuned, density)
    weighted = [w * t for w, t in zip(weights, trimmed, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1.0, -1.0)
    agree = [(u * sign > 0) for u in weighted]
    top = sum(u * a for u, a in zip(weighted, agree, strict=True))
    bottom = sum(abs(w) * a for w, a in zip(weights, agree, strict=True))
    return fp64(base) + scale * np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def test_linear_equals_weighted_mean() -> None:
    _, tuned = models(3)
    exact = sum(w * fp64(t) for w, t in zip(WEIGHTS, tuned, strict=True)) / sum(WEIGHTS)
    assert_rounded_once(merged(None, tuned, "linear", WEIGHTS), exact)


def test_linear_without_normalize_equals_weighted_sum() -> None:
    _, tuned = models(3)
    exact = sum(w * fp64(t) for w, t in zip(WEIGHTS, tuned, strict=True))
    assert_rounded_once(merged(None, tuned, "linear", WEIGHTS, normalize=False), exact)


@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic_equals_base_plus_scaled_sum(normalize) -> None:
    base, tuned = models(3)
    total = sum(WEIGHTS) if normalize else 1.0
    update = sum(w * (fp64(t) - fp64(base)) for w, t in zip(WEIGHTS, tuned, strict=True))
    found = merged(base, tuned, "task-arithmetic", WEIGHTS, scale=0.4, normalize=normalize)
    assert_rounded_once(found, fp64(base) + 0.4 * update / total)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS, [1.0, -0.5, 1.0]])
def test_ties_equals_trim_elect_merge(density, weights) -> None:
    base, tuned = models(3)
    found = merged(base, tuned, "ties", weights, density=density, scale=0.8)
    assert_rounded_once(found, ties_oracle(base, tuned, weights, density, 0.8))


def test_ties_over_the_model_equals_ties_on_the_concatenation() -> None:
    base, tuned = models(2)
    parts = {"a": slice(0, 10), "b": slice(10, 40), "c": slice(40, 64)}
    scales = {"a": 0.25, "b": 1.0, "c": 4.0}  # powers of two: exact in bf16

    def split(tensor):
        return {name: scales[name] * tensor[rows] for name, rows in parts.items()}

    def joined(tensors):
        return torch.cat([tensors[name] for name in parts])

    result = merge(
        [split(t) for t in tuned], base=split(base), method="ties", density=0.3, scope="model"
    )
    exact = ties_oracle(joined(split(base)), [joined(split(t)) for t in tuned], [1, 1], 0.3, 1.0)
    assert_rounded_once(joined(result.tensors), exact)


@pytest.mark.parametrize("density", [1e-5, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, -0.5, 1.0]])
def test_magnitude_prune_equals_base_plus_trimmed_sum(density, weights) -> None:
    """At 1e-5 not one entry of the 3072 would be kept; one is."""
    base, tuned = models(3)
    found = merged(base, tuned, "magnitude-prune", weights, density=density, scale=0.8)
    trimmed = trimmed_deltas(base, tuned, density)
    assert all(delta.any() for delta in trimmed)
    update = sum(w * t for w, t in zip(weights, trimmed, strict=True))
    assert_rounded_once(found, fp64(base) + 0.8 * update)


def test_magnitude_prune_over_the_model_counts_over_the_model() -> None:
    base, tuned = models(2)
    parts = {"a": slice(0, 40), "b": slice(40, 64)}

    def split(tensor):
        return {name: tensor[rows] for name, rows in parts.items()}

    found = merge(
        [split(t) for t in tuned],
        base=split(base),
        method="magnitude-prune",
        density=0.3,
        scope="model",
    )
    update = sum(trimmed_deltas(base, tuned, 0.3))
    joined = torch.cat([found.tensors[name] for name in parts])
    assert_rounded_once(joined, fp64(base) + update)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_slerp_follows_the_great_circle(t, spread) -> None:
    _, tuned = models(2, spread=spread)
    a, b = map(fp64, tuned)
    angle = math.acos((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))
    exact = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    assert_rounded_once(merged(None, tuned, "slerp", t=t), exact)


def test_slerp_of_parallel_or_zero_tensors_is_linear() -> None:
    a = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert_rounded_once(merged(None, [a, 2 * a], "slerp", t=0.25), fp64(a) * 1.25)
    assert_rounded_once(merged(None, [a, 0 * a], "slerp", t=0.25), fp64(a) * 0.75)


def test_slerp_keeps_the_norm_between_unit_tensors() -> None:
    a, b = torch.zeros(SHAPE), torch.zeros(SHAPE)
    a[0, 0] = b[1, 1] = 1.0
    found = merged(None, [a, b], "slerp", t=0.37)
    assert torch.linalg.vector_norm(found).item() == pytest.approx(1)


def test_passthrough_is_bit_exact_and_scales() -> None:
    _, tuned = models(1)
    assert torch.equal(merged(None, tuned, "passthrough"), tuned[0])
    assert_rounded_once(merged(None, tuned, "passthrough", scale=0.3), 0.3 * fp64(tuned[0]))


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output_dtype", [None, "float32", "bfloat16"])
def test_passthrough_with_a_base_takes_the_model(base_dtype, output_dtype) -> None:
    """Not the base's values, whatever the dtypes are."""
    base, tuned = models(1)
    settings = {"output_settings": {"dtype": output_dtype}} if output_dtype else {}
    found = merged(base.to(base_dtype), tuned, "passthrough", **settings)
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: base_dtype}
    assert found.dtype == wanted[output_dtype]
    assert torch.equal(found, tuned[0].to(found.dtype))
