"""What the decoupled merge promises, through the engine: laws, gate, edges, settings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from orthomerge import merge, plan
from orthomerge.errors import NumericalError, OrthoMergeError, TensorMismatchError

NAME = "layers.0.up.weight"
FP64 = {"compute_dtype": "float64"}
MODES = ("faithful", "robust")
ANCHORS = {"faithful": 1e-6, "robust": 1e-3}
ROTATION_ONLY = {"method": "task-arithmetic", "scale": 0.0}


def run(base, experts, *, name=NAME, dtype=torch.float64, **given_settings):
    """Merge single tensors; return the result."""
    return merge(
        [{name: torch.as_tensor(W).to(dtype)} for W in experts],
        base={name: torch.as_tensor(base).to(dtype)},
        **{
            "method": "orthomerge-decoupled",
            "gate": "off",
            "mode": "faithful",
            "run_settings": FP64,
            **given_settings,
        },
    )


def merged(base, experts, *, name=NAME, **given_settings) -> np.ndarray:
    return run(base, experts, name=name, **given_settings).tensors[name].double().numpy()


def facts_of(base, experts, *, name=NAME, **given_settings) -> dict:
    return run(base, experts, name=name, **given_settings).details[name]["facts"]


def mean_of(count: int) -> dict:
    return {"method": "task-arithmetic", "scale": 1 / count}


def weight(o: int, n: int, kappa: float, seed: int) -> np.ndarray:
    """A matrix with singular values from 1 to 1 / kappa between random frames."""
    rng = np.random.default_rng(seed)
    k = min(o, n)
    U, V = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (o, n))
    return (U * np.geomspace(1, 1 / kappa, k)) @ V.T


def noisy(base: np.ndarray, count: int, size: float, seed: int) -> list[np.ndarray]:
    """The base with changes of ``size`` times its norm."""
    rng = np.random.default_rng(seed)
    changes = [rng.standard_normal(base.shape) for _ in range(count)]
    return [base + size * np.linalg.norm(base) / np.linalg.norm(D) * D for D in changes]


def skew(n: int, largest: float, seed: int) -> np.ndarray:
    G = np.random.default_rng(seed).standard_normal((n, n))
    return largest * (G - G.T) / np.linalg.norm(G - G.T, 2)


def orthogonal(n: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


# An independent account of the whole merge, with the anchor.


def fitted(W0, X, anchor):
    n = W0.shape[1]
    U, _, Vh = np.linalg.svd(W0.T @ X + anchor * (W0**2).sum() / n * np.eye(n))
    return U @ Vh


def inverse_cayley(R):
    eye = np.eye(len(R))
    return eye - 2 * np.linalg.inv(R + eye)


def cayley(A):
    eye = np.eye(len(A))
    return 2 * np.linalg.inv(eye - A) - eye


def split_oracle(W0, experts, anchor):
    """Return generators and residuals."""
    found = [fitted(W0, W, anchor) for W in experts]
    residuals = [W - W0 @ R for W, R in zip(experts, found, strict=True)]
    return [inverse_cayley(R) for R in found], residuals


def corrected(generators, weights, c_max=math.inf):
    shares = np.array(weights) / np.sum(weights)
    S = sum(w * A for w, A in zip(shares, generators, strict=True))
    m = sum(w * np.linalg.norm(A) for w, A in zip(shares, generators, strict=True))
    return min(m / np.linalg.norm(S), c_max) * S


cases = st.tuples(
    st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.sampled_from([1.0, 10.0, 300.0])
)
modes = st.sampled_from(MODES)
seeds = st.integers(0, 10_000)


@given(cases, modes, seeds)
@settings(max_examples=40)
def test_equals_the_anchored_oracle(case, mode, seed) -> None:
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    experts = noisy(W0, count, 0.02, seed + 1)
    anchor = 1e-3  # far from the limit, which special forms of the fit take
    generators, residuals = split_oracle(W0, experts, anchor)
    c_max = 3 * math.sqrt(count) if mode == "robust" else math.inf
    R = cayley(corrected(generators, [1.0] * count, c_max))
    wanted = W0 @ R + 0.4 * sum(residuals)
    found = merged(
        W0, experts, mode=mode, anchor=anchor, residual={"method": "task-arithmetic", "scale": 0.4}
    )
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@given(cases, modes, seeds)
@settings(max_examples=25)
def test_one_expert_is_itself_and_equal_experts_are_themselves(case, mode, seed) -> None:
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    (W,) = noisy(W0, 1, 0.05, seed + 1)
    np.testing.assert_allclose(merged(W0, [W], mode=mode), W, atol=1e-12)
    found = merged(W0, [W] * count, mode=mode, residual=mean_of(count))
    np.testing.assert_allclose(found, W, atol=1e-12)


@given(cases, modes, seeds)
@settings(max_examples=25)
def test_order_and_scale(case, mode, seed) -> None:
    """The order does not matter; scaling everything scales the result."""
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    experts = noisy(W0, count, 0.02, seed + 1)
    one = merged(W0, experts, mode=mode)
    np.testing.assert_allclose(merged(W0, experts[::-1], mode=mode), one, atol=1e-10)
    for a in (1e-3, 3.7, 1e4):
        scaled = merged(a * W0, [a * W for W in experts], mode=mode)
        np.testing.assert_allclose(scaled / a, one, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (5, 8), (4, 11)])
@pytest.mark.parametrize("mode", MODES)
def test_turning_inputs_and_outputs_turns_the_result(shape, mode) -> None:
    o, n = shape
    W0 = weight(o, n, 5.0, 1)
    experts = noisy(W0, 3, 0.05, 2)
    H, G = orthogonal(o, 3), orthogonal(n, 4)
    choice = {"mode": mode, "residual": mean_of(3)}
    found = merged(H @ W0 @ G, [H @ W @ G for W in experts], **choice)
    np.testing.assert_allclose(found, H @ merged(W0, experts, **choice) @ G, atol=1e-11)


@pytest.mark.parametrize("shape", [(9, 6), (5, 8)])
def test_a_rotation_and_its_inverse_cancel(shape) -> None:
    W0 = weight(*shape, 5.0, 1)
    R = expm(skew(shape[1], 0.5, 2))
    if shape[0] < shape[1]:  # turn what the rows span, or the smallest rotation is another one
        V = np.linalg.svd(W0, full_matrices=False)[2]
        R = np.eye(shape[1]) + V.T @ (expm(skew(shape[0], 0.5, 2)) - np.eye(shape[0])) @ V
    facts = facts_of(W0, [W0 @ R, W0 @ R.T], zero_guard=1e-4)
    assert facts["zeroed"] == 1
    assert facts["merged_norm"] == 0.0
    found = merged(W0, [W0 @ R, W0 @ R.T], zero_guard=1e-4)
    np.testing.assert_allclose(found, W0, atol=1e-5)


def test_near_opposites_are_capped() -> None:
    W0 = weight(9, 6, 3.0, 1)
    L = skew(6, 0.5, 2)
    experts = [W0 @ cayley(L), W0 @ cayley(-0.9 * L)]
    facts = facts_of(W0, experts, anchor=1e-9, c_max=3.0)
    assert facts["capped"] == 1
    assert facts["correction"] == pytest.approx([3.0])
    assert facts["merged_norm"] == pytest.approx(3 * np.linalg.norm(0.05 * L), rel=1e-6)
    free = facts_of(W0, experts, anchor=1e-9)
    assert free["correction"] == pytest.approx([19.0], rel=1e-5)
    assert facts_of(W0, experts, anchor=1e-9, mode="robust")["correction"] == pytest.approx(
        [3 * math.sqrt(2)]
    )


def energy(W: np.ndarray) -> float:
    V = W / np.linalg.norm(W, axis=1, keepdims=True)
    distances = np.linalg.norm(V[:, None] - V[None], axis=2)
    return (1 / distances[~np.eye(len(W), dtype=bool)]).sum()


@given(cases, modes, seeds)
@settings(max_examples=20)
def test_rotated_base_keeps_rows_spectrum_and_energy(case, mode, seed) -> None:
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    experts = noisy(W0, count, 0.05, seed + 1)
    rotated = merged(W0, experts, mode=mode, residual=ROTATION_ONLY)
    rows = np.linalg.norm(W0, axis=1)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), rows, rtol=1e-10)
    spectra = [np.linalg.svd(W)[1] for W in (rotated, W0)]
    np.testing.assert_allclose(*spectra, atol=1e-12)
    if n > 2:  # in two dimensions rows can coincide
        assert energy(rotated) == pytest.approx(energy(W0), rel=1e-7)


@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (5, 8), (3, 11), (7,), (4, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["faithful", "robust", "reproduce"])
def test_experts_that_did_not_change_give_the_base_bit_for_bit(shape, dtype, mode) -> None:
    W0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = run(W0, [W0] * 3, dtype=dtype, mode=mode, rotate_conv=True, run_settings={})
    assert torch.equal(found.tensors[NAME], W0)


@pytest.mark.parametrize("mode", MODES)
def test_without_conflicts_the_residual_method_has_it_all(mode) -> None:
    W0 = weight(9, 6, 5.0, 1)
    (W,) = noisy(W0, 1, 0.05, 2)
    experts = [W, W0 + 0.3 * (W - W0)]
    choice = {"mode": mode, "variant": "conflict-aware", "residual": {"method": "ties"}}
    found = run(W0, experts, **choice)
    plain = merge(
        [{NAME: torch.tensor(V)} for V in experts],
        base={NAME: torch.tensor(W0)},
        method="ties",
        run_settings=FP64,
    )
    assert torch.equal(found.tensors[NAME], plain.tensors[NAME])
    assert [m["conflict_rows"] for m in found.details[NAME]["facts"]["models"]] == [0, 0]


def test_conflict_aware_explains_only_rows_in_conflict() -> None:
    W0 = weight(10, 6, 5.0, 1)
    experts = noisy(W0, 3, 0.05, 2)
    mean = sum(W - W0 for W in experts) / 3
    conflicts = [((W - W0) * mean).sum(1) < 0 for W in experts]
    models = facts_of(W0, experts, variant="conflict-aware")["models"]
    assert [m["conflict_rows"] for m in models] == [int(c.sum()) for c in conflicts]
    assert sum(c.sum() for c in conflicts) > 0
    targets = [W0 + c[:, None] * (W - W0) for c, W in zip(conflicts, experts, strict=True)]
    R = [fitted(W0, X, 1e-3) for X in targets]
    turned = cayley(corrected([inverse_cayley(r) for r in R], [1.0] * 3))
    wanted = W0 @ turned + sum(W - W0 @ r for W, r in zip(experts, R, strict=True)) / 3
    found = merged(W0, experts, variant="conflict-aware", anchor=1e-3)
    np.testing.assert_allclose(found, wanted, atol=1e-11)


@given(cases, modes, seeds)
@settings(max_examples=25)
def test_merged_norm_is_the_weighted_mean_of_the_experts(case, mode, seed) -> None:
    o, n, count, kappa = case
    W0 = weight(o, n, kappa, seed)
    experts = noisy(W0, count, 0.02, seed + 1)
    weights = list(np.random.default_rng(seed).uniform(0.1, 2, count))
    generators, _ = split_oracle(W0, experts, 1e-3)
    sizes = [np.linalg.norm(A) for A in generators]
    facts = facts_of(W0, experts, mode=mode, weights=weights, anchor=1e-3, c_max=1e9)
    assert facts["merged_norm"] == pytest.approx(np.average(sizes, weights=weights), rel=1e-8)


# The gate.


def big(o: int = 48, n: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((o, n)) / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", ["global", "conflict-aware"])
@pytest.mark.parametrize(
    "residual",
    [
        {"method": "tsv-m"},
        {"method": "tsv-m", "scale": 0.6},
        {"method": "ties", "density": 0.3},
        {"method": "ties", "density": 0.3, "scope": "model"},
        {"method": "task-arithmetic", "scale": 0.3},
    ],
    ids=str,
)
def test_gated_merge_of_noise_is_its_residual_method_bit_for_bit(dtype, variant, residual) -> None:
    shapes = {
        NAME: (48, 32),
        "layers.0.down.weight": (32, 64),
        "layers.0.norm.weight": (32,),
        "layers.0.mlp.experts.up_proj": (3, 48, 32),
        "embed_tokens.weight": (40, 32),
    }
    rng = np.random.default_rng(0)
    base = {name: torch.tensor(rng.standard_normal(s)).to(dtype) for name, s in shapes.items()}
    noise = [{name: rng.standard_normal(W.shape) for name, W in base.items()} for _ in range(3)]
    for name, values in noise[2].items():
        values -= 0.7 * noise[0][name]  # so that some rows are in conflict
    experts = [
        {name: (W + 0.02 * torch.tensor(each[name])).to(dtype) for name, W in base.items()}
        for each in noise
    ]
    weights = [1.0, 0.5, 2.0]
    choice = {"mode": "robust", "variant": variant, "residual": residual}
    gated = merge(experts, base=base, method="orthomerge-decoupled", weights=weights, **choice)
    alone = merge(experts, base=base, weights=weights, **residual)
    for name, value in alone.tensors.items():
        assert torch.equal(gated.tensors[name], value), name
    models = gated.details[NAME]["facts"]["models"]
    assert not any(m["rotated"] for m in models)
    ungated = merge(
        experts, base=base, method="orthomerge-decoupled", weights=weights, **choice, gate="off"
    )
    assert not torch.equal(ungated.tensors[NAME], alone.tensors[NAME])


@pytest.mark.parametrize("shape", [(48, 32), (32, 32), (32, 64)])
@pytest.mark.parametrize("variant", ["global", "conflict-aware"])
def test_noise_leaves_what_the_gate_takes_for_noise(shape, variant) -> None:
    W0 = big(*shape)
    experts = noisy(W0, 4, 0.02, 5)
    experts[3] -= 1.2 * (experts[0] - W0)  # so that some rows are in conflict
    models = facts_of(W0, experts, variant=variant, anchor=1e-3)["models"]
    levels = [m["residual_over_noise"] for m in models if m.get("conflict_rows", 32) > 5]
    assert levels
    for level in levels:
        assert level == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("shape", [(48, 32), (32, 32), (32, 64)])
def test_rotational_expert_passes_the_gate_alone(shape) -> None:
    """One rotates, two are noise: its rotation takes part at its share, the others not at all."""
    W0 = big(*shape)
    turned = W0 @ expm(skew(shape[1], 0.2, 3)) + 0.001 * big(*shape, seed=4)
    experts = [turned, *noisy(W0, 2, 0.02, 5)]
    found = run(W0, experts, gate="auto", anchor=1e-3, residual=mean_of(3))
    facts = found.details[NAME]["facts"]
    assert [m["rotated"] for m in facts["models"]] == [True, False, False]
    R = fitted(W0, turned, 1e-3)
    A = inverse_cayley(R)
    assert facts["merged_norm"] == pytest.approx(np.linalg.norm(A) / 3, rel=1e-6)
    residuals = [turned - W0 @ R, experts[1] - W0, experts[2] - W0]
    wanted = W0 @ cayley(A / 3) + sum(residuals) / 3
    np.testing.assert_allclose(found.tensors[NAME].numpy(), wanted, atol=1e-8)
    # whoever has no weight has no say, also when it is the only one that rotates
    alone = merged(W0, experts, gate="auto", weights=[0.0, 1.0, 1.0], residual={"method": "ties"})
    assert np.isfinite(alone).all()


def test_conflict_aware_gate_lets_rotations_pass() -> None:
    """Rows in conflict that rotate together: the gate must be able to see it."""
    W0 = big(64, 8)
    experts = [W0 @ expm(skew(8, 0.1, 3)), W0 @ expm(-0.8 * skew(8, 0.1, 3))]
    models = facts_of(W0, experts, variant="conflict-aware", gate="auto", anchor=1e-3)["models"]
    assert max(m["conflict_rows"] for m in models) > 32
    assert any(m["rotated"] for m in models)


def test_margin_decides() -> None:
    W0 = big()
    experts = [W0 @ expm(skew(32, 0.02, s)) + 0.004 * big(seed=s) for s in (3, 4)]
    level = facts_of(W0, experts, anchor=1e-3)["models"][0]["residual_over_noise"]
    assert 0.3 < level < 0.99
    for margin, expected in ((0.99 * (1 - level), True), (1.01 * (1 - level), False)):
        models = facts_of(W0, experts, gate="auto", margin=margin, anchor=1e-3)["models"]
        assert models[0]["rotated"] is expected


# Edges.


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


# Settings.


def test_blocks_rotate_by_themselves_under_one_correction() -> None:
    W0 = weight(12, 8, 3.0, 1)
    experts = noisy(W0, 3, 0.05, 2)
    anchor = 1e-3
    n, shift = 8, anchor * (W0**2).sum() / 8
    R = np.zeros((3, n, n))
    for at, W in enumerate(experts):
        for k in (slice(0, 4), slice(4, 8)):
            U, _, Vh = np.linalg.svd(W0[:, k].T @ W[:, k] + shift * np.eye(4))
            R[at][k, k] = U @ Vh
    A = [inverse_cayley(r) for r in R]
    residuals = sum(W - W0 @ r for W, r in zip(experts, R, strict=True)) / 3
    for correction in ("layer", "block", "none"):
        if correction == "layer":
            A_m = corrected(A, [1.0] * 3)
        elif correction == "none":
            A_m = sum(A) / 3
        else:
            A_m = np.zeros((n, n))
            for k in (slice(0, 4), slice(4, 8)):
                A_m[k, k] = corrected([a[k, k] for a in A], [1.0] * 3)
        found = merged(W0, experts, block=4, correction=correction, anchor=anchor)
        np.testing.assert_allclose(found, W0 @ cayley(A_m) + residuals, atol=1e-11)


def planar(angle: float, n: int = 2, at: int = 0) -> np.ndarray:
    R = np.eye(n)
    c, s = math.cos(angle), math.sin(angle)
    R[at : at + 2, at : at + 2] = [[c, s], [-s, c]]
    return R


@pytest.mark.parametrize(
    ("chart", "angle"),
    [("log", 0.4), ("cayley", 2 * math.atan((math.tan(0.1) + math.tan(0.3)) / 2))],
)
def test_charts_average_angles_of_one_plane(chart, angle) -> None:
    W0 = np.diag([2.0, 1.0])
    experts = [W0 @ planar(0.2), W0 @ planar(0.6)]
    found = merged(W0, experts, chart=chart, anchor=0.0, residual=ROTATION_ONLY)
    np.testing.assert_allclose(found, W0 @ planar(angle), atol=1e-12)


def test_charts_of_disjoint_planes_differ_from_one_plane_by_the_correction() -> None:
    W0 = np.diag([2.0, 1.0, 1.5, 0.7])
    experts = [W0 @ planar(0.4, 4, 0), W0 @ planar(0.4, 4, 2)]
    for chart, angle in (("cayley", 0.2847358216066036), ("log", 0.4 / math.sqrt(2))):
        found = merged(W0, experts, chart=chart, anchor=0.0, residual=ROTATION_ONLY)
        wanted = W0 @ planar(angle, 4, 0) @ planar(angle, 4, 2)
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_log_chart_rotates_blocks_and_wide_layers() -> None:
    for shape, block in (((12, 8), 4), ((5, 12), 0), ((5, 12), 4)):
        W0 = weight(*shape, 3.0, 1)
        (W,) = noisy(W0, 1, 0.05, 2)
        found = merged(W0, [W], chart="log", block=block)
        np.testing.assert_allclose(found, W, atol=1e-12)


def test_strength_multiplies_the_generator() -> None:
    W0 = weight(9, 6, 3.0, 1)
    experts = noisy(W0, 3, 0.05, 2)
    generators, _ = split_oracle(W0, experts, 1e-3)
    choice = {"anchor": 1e-3, "residual": ROTATION_ONLY}
    for strength in (0.0, 0.5, -1.0, 2.0):
        wanted = W0 @ cayley(strength * corrected(generators, [1.0] * 3))
        found = merged(W0, experts, strength=strength, **choice)
        np.testing.assert_allclose(found, wanted, atol=1e-11)


def test_weights_per_model_and_per_layer() -> None:
    W0 = weight(9, 6, 3.0, 1)
    experts = noisy(W0, 2, 0.05, 2)
    names = ("layers.0.up.weight", "layers.1.up.weight")
    models = [{name: torch.tensor(W) for name in names} for W in experts]
    rules = [[{"match": "layers.0.*", "value": 1.0}, {"value": 3.0}], 1.0]
    choice = {"mode": "faithful", "anchor": 1e-3, "residual": "task-arithmetic"}
    result = merge(
        models,
        base={name: torch.tensor(W0) for name in names},
        method="orthomerge-decoupled",
        weights=rules,
        run_settings=FP64,
        **choice,
    )
    generators, residuals = split_oracle(W0, experts, 1e-3)
    for name, weights in zip(names, ([1.0, 1.0], [3.0, 1.0]), strict=True):
        summed = sum(w * r for w, r in zip(weights, residuals, strict=True))
        wanted = W0 @ cayley(corrected(generators, weights)) + summed
        np.testing.assert_allclose(result.tensors[name], wanted, atol=1e-11)


def test_ties_over_the_model_trims_all_residuals_together() -> None:
    """By hand, on residuals laid end to end; a stack, a vector and a wide matrix among them."""
    rng = np.random.default_rng(0)
    base = {
        "layers.0.up.weight": weight(9, 6, 3.0, 1),
        "layers.0.down.weight": weight(5, 12, 3.0, 2),
        "layers.0.mlp.experts.up_proj": np.stack([weight(7, 5, 2.0, s) for s in (3, 4)]),
        "layers.0.up.bias": rng.standard_normal(9),
    }
    sizes = dict(zip(base, (0.02, 0.2, 0.1, 0.05), strict=True))
    experts = [{n: noisy(W, 1, sizes[n], 9 + i)[0] for n, W in base.items()} for i in range(3)]

    def parts(name):
        W0, Ws = base[name], [e[name] for e in experts]
        if W0.ndim == 1:
            return W0, [W - W0 for W in Ws]
        if W0.ndim == 3:
            each = [one(W0[at], [W[at] for W in Ws]) for at in range(len(W0))]
            return np.stack([e[0] for e in each]), [
                np.stack([e[1][i] for e in each]) for i in range(3)
            ]
        return one(W0, Ws)

    def one(W0, Ws):
        generators, residuals = split_oracle(W0, Ws, 1e-3)
        return W0 @ cayley(corrected(generators, [1.0] * 3)), residuals

    found = {name: parts(name) for name in base}
    flat = np.stack([np.concatenate([found[n][1][i].ravel() for n in base]) for i in range(3)])
    keep = math.floor(0.3 * flat.shape[1] + 1e-9)
    cut = np.sort(np.abs(flat), axis=1)[:, [-keep]]
    kept = np.where(np.abs(flat) >= cut, flat, 0.0)
    sign = np.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept * sign > 0
    update = (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)
    result = merge(
        [{n: torch.tensor(W) for n, W in e.items()} for e in experts],
        base={n: torch.tensor(W) for n, W in base.items()},
        method="orthomerge-decoupled",
        mode="faithful",
        anchor=1e-3,
        residual={"method": "ties", "density": 0.3, "scope": "model"},
        run_settings=FP64,
    )
    start = 0
    for name, (rotated, _) in found.items():
        piece = update[start : start + rotated.size].reshape(rotated.shape)
        np.testing.assert_allclose(result.tensors[name], rotated + piece, atol=1e-11)
        start += rotated.size


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"residual": {"method": "linear"}}, "merges task vectors"),
        ({"residual": "orthomerge-decoupled"}, "merges task vectors"),
        ({"residual": {"method": "tsv"}}, "Did you mean 'tsv-m'"),
        ({"residual": {"method": "ties", "densty": 0.2}}, "Did you mean 'density'"),
        ({"residual": {"method": "ties", "density": 1.2}}, "in (0, 1]"),
        ({"residual": {"density": 0.2}}, "with the key method"),
        ({"residual": {"method": "ties", "density": [0.1, 0.2]}}, "in (0, 1]"),
        ({"residual": ["ties", "tsv-m"]}, "gradient of numbers"),
        ({"mode": ["robust", "faithful"]}, "gradient of numbers"),
        ({"c_max": [None, 2.0]}, "gradient of numbers"),
        ({"residual": 3}, "a method of task vectors"),
        ({"weights": [1.0, -0.5]}, "must not be negative"),
        ({"weights": [0.0, 0.0]}, "sum to zero"),
        ({"mode": "exact"}, "robust | faithful | reproduce"),
        ({"anchor": -1.0}, "anchor"),
        ({"gate": "on"}, "auto | off"),
        ({"c_max": 0.5}, "c_max"),
        ({"margn": 0.1}, "Did you mean 'margin'"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_in_the_plan(choice, words) -> None:
    W0 = torch.tensor(weight(9, 6, 3.0, 1))
    with pytest.raises(OrthoMergeError) as caught:
        plan([{NAME: W0}] * 2, base={NAME: W0}, method="orthomerge-decoupled", **choice)
    assert words in str(caught.value)


def test_a_block_that_does_not_divide_the_inputs_names_the_tensor() -> None:
    W0 = weight(9, 6, 3.0, 1)
    with pytest.raises(OrthoMergeError, match=NAME):
        merged(W0, noisy(W0, 2, 0.05, 2), block=4)
