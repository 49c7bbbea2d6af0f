"""The decoupled merge of what is zero, dead, tied, wide, a stack, a kernel, or broken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoupled_models import (
    MODES,
    NAME,
    ROTATION_ONLY,
    cayley,
    corrected,
    facts_of,
    inverse_cayley,
    merged,
    noisy,
    orthogonal,
    run,
    skew,
    split_oracle,
    weight,
)
from scipy.linalg import expm

from orthomerge import merge, plan
from orthomerge.errors import NumericalError, TensorMismatchError


@pytest.mark.parametrize("mode", ["faithful", "robust", "reproduce"])
def test_zero_base_is_left_to_the_residual_method(mode) -> None:
    W0 = np.zeros((9, 6))
    experts = noisy(weight(9, 6, 2.0, 1), 2, 0.5, 2)
    found = merged(W0, experts, mode=mode, residual={"method": "task-arithmetic", "scale": 0.5})
    np.testing.assert_allclose(found, sum(experts) / 2, atol=1e-15)


def test_expert_without_a_change_counts_as_the_identity() -> None:
    W0 = weight(9, 6, 3.0, 1)
    (W,) = noisy(W0, 1, 0.05, 2)
    (A,), (residual,) = split_oracle(W0, [W], 1e-3)
    wanted = W0 @ cayley(A / 2) + residual / 2
    np.testing.assert_allclose(merged(W0, [W, W0], anchor=1e-3), wanted, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (5, 8)])
@pytest.mark.parametrize("mode", MODES)
def test_dead_inputs_stay_where_they_are(shape, mode) -> None:
    """Columns of zeros determine no rotation: nothing is moved into them."""
    W0 = weight(*shape, 3.0, 1)
    W0[:, :2] = 0
    experts = noisy(W0, 3, 0.05, 2)
    for W in experts:
        W[:, :2] = 0
    found = merged(W0, experts, mode=mode)
    np.testing.assert_allclose(found[:, :2], 0, atol=1e-12)
    assert facts_of(W0, experts, mode=mode)["moved"] < 0.1


@pytest.mark.parametrize("mode", MODES)
def test_tied_singular_values(mode) -> None:
    W0 = orthogonal(8, 1)[:, :6]
    L = [skew(6, 0.3, seed) for seed in (2, 3)]
    experts = [W0 @ expm(M) for M in L]
    found = merged(W0, experts, mode=mode, residual=ROTATION_ONLY, anchor=1e-12)
    generators = [inverse_cayley(expm(M)) for M in L]
    np.testing.assert_allclose(found, W0 @ cayley(corrected(generators, [1, 1])), atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_ill_conditioned_layers_stay_rotations(mode) -> None:
    W0 = weight(24, 24, 1000.0, 1)
    experts = noisy(W0, 3, 0.02, 2)
    rotated = merged(W0, experts, mode=mode, residual=ROTATION_ONLY)
    R = np.linalg.solve(W0, rotated)
    np.testing.assert_allclose(R.T @ R, np.eye(24), atol=1e-6)
    assert np.linalg.det(R) > 0
    np.testing.assert_allclose(merged(W0, experts[:1], mode=mode), experts[0], atol=1e-12)


def test_vectors_and_kernels_go_to_the_residual_method_alone() -> None:
    rng = np.random.default_rng(1)
    for name, shape in (("layers.0.up.bias", (9,)), ("conv.weight", (6, 2, 2, 2))):
        W0 = rng.standard_normal(shape)
        experts = noisy(W0, 3, 0.1, 2)
        found = merged(W0, experts, name=name)
        np.testing.assert_allclose(found, sum(experts) / 3, atol=1e-14)
        assert "correction" not in facts_of(W0, experts, name=name)


def test_kernels_are_rotated_as_matrices_when_asked_for() -> None:
    W0 = weight(9, 8, 3.0, 1)
    experts = noisy(W0, 3, 0.05, 2)
    kernels = [W.reshape(9, 2, 2, 2) for W in (W0, *experts)]
    found = merged(kernels[0], kernels[1:], name="conv.weight", rotate_conv=True)
    np.testing.assert_allclose(found.reshape(9, 8), merged(W0, experts), atol=1e-14)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_embeddings_are_rotated_unless_left_out(name) -> None:
    W0 = weight(12, 8, 3.0, 1)
    experts = noisy(W0, 3, 0.05, 2)
    np.testing.assert_array_equal(merged(W0, experts, name=name), merged(W0, experts))
    found = merged(W0, experts, name=name, include_embeddings=False)
    np.testing.assert_allclose(found, sum(experts) / 3, atol=1e-15)


def test_stacks_of_experts_rotate_matrix_by_matrix() -> None:
    W0 = np.stack([weight(9, 6, 3.0, seed) for seed in range(3)])
    experts = [np.stack(parts) for parts in zip(*(noisy(W, 2, 0.05, 7) for W in W0), strict=True)]
    each = [merged(W0[at], [W[at] for W in experts]) for at in range(3)]
    result = run(W0, experts, name="layers.0.mlp.experts.up_proj")
    (value,) = result.tensors.values()
    np.testing.assert_allclose(value, np.stack(each), atol=1e-14)
    (details,) = result.details.values()
    assert len(details["facts"]["stack"]) == 3


@pytest.mark.parametrize("method", ["orthomerge-decoupled", "geodesic", "tsv-m"])
def test_stacks_need_the_memory_of_their_matrices(method) -> None:
    def peak(name, *shape):
        W = {name: torch.zeros(shape)}
        return plan([W, W], base=W, method=method).tasks[0].peak_bytes

    one, stack = peak("a.up.weight", 128, 64), peak("a.mlp.experts.up_proj", 16, 128, 64)
    assert one < stack < 20 * one


def test_one_expert_has_no_conflicts() -> None:
    W0 = weight(9, 6, 3.0, 1)
    (W,) = noisy(W0, 1, 0.05, 2)
    facts = facts_of(W0, [W], variant="conflict-aware")
    assert facts == {"models": [{"rotated": False, "conflict_rows": 0}]}
    np.testing.assert_allclose(merged(W0, [W], variant="conflict-aware"), W, atol=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_rounded_once(mode) -> None:
    W0 = torch.tensor(weight(24, 16, 10.0, 1)).bfloat16()
    experts = [torch.tensor(W).bfloat16() for W in noisy(W0.double().numpy(), 3, 0.05, 2)]
    found = run(W0, experts, dtype=torch.bfloat16, mode=mode, run_settings={}).tensors[NAME]
    exact = run(W0.double(), [W.double() for W in experts], mode=mode).tensors[NAME]
    differs = found != exact.bfloat16()
    assert found.dtype == torch.bfloat16
    assert differs.double().mean() < 0.02
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01).all()
    alone = run(W0, experts[:1], dtype=torch.bfloat16, mode=mode, run_settings={}).tensors[NAME]
    assert (alone != experts[0]).double().mean() < 0.001


def test_missing_and_broken_tensors() -> None:
    W0 = weight(9, 6, 3.0, 1)
    experts = noisy(W0, 2, 0.05, 2)
    models = [{NAME: torch.tensor(W), "b.weight": torch.tensor(W)} for W in experts]
    base = {NAME: torch.tensor(W0), "b.weight": torch.tensor(W0)}
    del models[1]["b.weight"]
    with pytest.raises(TensorMismatchError, match=r"b\.weight"):
        plan(models, base=base, method="orthomerge-decoupled")
    found = merge(models, base=base, method="orthomerge-decoupled", missing="copy-base").tensors
    assert torch.equal(found["b.weight"], base["b.weight"])
    experts[1][3, 2] = np.inf
    with pytest.raises(NumericalError, match=NAME):
        merged(W0, experts)
    experts[1][3, 2] = np.nan
    with pytest.raises(NumericalError, match=NAME):
        merged(W0, experts)
