"""The geodesic merge through the engine: what it does to models that differ by rotations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from orthomerge import merge

NAME = "layers.0.up.weight"
TIGHT = {"anchor": 1e-10, "run_settings": {"compute_dtype": "float64"}}


def generator_matrix(n: int, largest: float, seed: int = 0) -> np.ndarray:
    """A skew matrix whose exponential turns no plane further than ``largest``."""
    G = np.random.default_rng(seed).standard_normal((n, n))
    L = G - G.T
    return L * largest / np.linalg.norm(L, 2)


def weight(o: int, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((o, n))


def merged(weights, *, name=NAME, dtype=torch.float64, share=None, **settings) -> np.ndarray:
    models = [{name: torch.tensor(W, dtype=dtype)} for W in weights]
    result = merge(models, method="geodesic", weights=share, **{**TIGHT, **settings})
    return result.tensors[name].double().numpy()


@pytest.mark.parametrize("shape", [(14, 8), (8, 8)])
@pytest.mark.parametrize("share", [0.5, 0.2, 0.9])
@pytest.mark.parametrize("largest", [0.1, 1.0, 2.5])
def test_two_models_meet_on_the_geodesic(shape, share, largest) -> None:
    """W_2 = W_1 exp(L): the point W_1 exp(w_2 L), whatever the weights' sum."""
    W, L = weight(*shape), generator_matrix(shape[1], largest)
    found = merged([W, W @ expm(L)], share=[3 * (1 - share), 3 * share])
    np.testing.assert_allclose(found, W @ expm(share * L), atol=1e-6)


def test_order_does_not_matter() -> None:
    W = weight(10, 6)
    models = [W @ expm(generator_matrix(6, 0.8, seed)) for seed in range(3)]
    one = merged(models, share=[1.0, 2.0, 3.0])
    other = merged(models[::-1], share=[3.0, 2.0, 1.0])
    np.testing.assert_allclose(one, other, atol=1e-8)
    assert np.abs(one - merged(models, share=[3.0, 2.0, 1.0])).max() > 1e-3


def test_turning_the_inputs_turns_the_merge() -> None:
    rng = np.random.default_rng(5)
    models = [weight(10, 6, seed) for seed in (1, 2)]
    models[1] = models[0] @ expm(generator_matrix(6, 0.7)) + 0.05 * models[1]
    G = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    H = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    turned = merged([H @ W @ G for W in models])
    np.testing.assert_allclose(turned, H @ merged(models) @ G, atol=1e-7)


def test_models_without_a_rotation_between_them_are_averaged() -> None:
    """W_2 = W_1 P with P symmetric and positive: their best rotation is the identity."""
    W = weight(12, 6)
    P = np.eye(6) + 0.1 * generator_matrix(6, 1.0) @ generator_matrix(6, 1.0).T
    S = np.linalg.svd(W, full_matrices=False)
    other = (S[0] * (S[1] * [1.1, 0.9, 1.2, 0.8, 1.0, 1.05])) @ S[2]
    np.testing.assert_allclose(merged([W, other]), (W + other) / 2, atol=1e-9)
    # W^T W P is not symmetric, so this pair does turn a little, unless the gate finds it small.
    average = W @ (np.eye(6) + P) / 2
    np.testing.assert_allclose(merged([W, W @ P]), average, atol=1e-14)
    assert np.abs(merged([W, W @ P], gate="off") - average).max() > 1e-6


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (16, 40)])
def test_gate_averages_noise_bit_for_bit_and_turns_rotations(shape) -> None:
    W = weight(*shape)
    noise = [W + 0.02 * weight(*shape, seed) for seed in (2, 3)]
    turned = [W @ expm(generator_matrix(shape[1], 0.3, seed)) for seed in (2, 3)]
    for dtype, settings in ((torch.float64, {}), (torch.bfloat16, {"run_settings": {}})):
        models = [{NAME: torch.tensor(V, dtype=dtype)} for V in noise]
        plain = merge(models, method="linear", weights=[0.3, 0.7], **settings).tensors[NAME]
        found = merged(noise, dtype=dtype, share=[0.3, 0.7], **{"anchor": 1e-3, **settings})
        assert (found == plain.double().numpy()).all()
    assert np.abs(merged(turned, anchor=1e-3) - sum(turned) / 2).max() > 1e-2


def test_turned_models_keep_norms_which_the_average_shrinks() -> None:
    W = weight(12, 8)
    models = [W, W @ expm(generator_matrix(8, 1.5))]
    found, average = merged(models), sum(models) / 2
    rows = np.linalg.norm(W, axis=1)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), rows, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(found)[1], np.linalg.svd(W)[1], rtol=1e-6)
    assert np.linalg.norm(average) < 0.97 * np.linalg.norm(W)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (9,), (4, 2, 3)])
def test_equal_models_are_themselves(shape) -> None:
    W = np.random.default_rng(2).standard_normal(shape)
    np.testing.assert_allclose(merged([W] * 3, share=[1.0, 2.0, 4.0]), W, atol=1e-12)


def test_wide_matrices_turn_only_within_what_they_span() -> None:
    """Rows in the plane of two inputs: what the weights do not determine stays where it is."""
    W = np.zeros((2, 7))
    W[0, 0], W[1, 1] = 2.0, 1.0
    turn = np.eye(7)
    turn[:2, :2] = [[math.cos(1), math.sin(1)], [-math.sin(1), math.cos(1)]]
    found = merged([W, W @ turn])
    half = np.array([[math.cos(0.5), math.sin(0.5)], [-math.sin(0.5), math.cos(0.5)]])
    np.testing.assert_allclose(found[:, :2], W[:, :2] @ half, atol=1e-6)
    np.testing.assert_allclose(found[:, 2:], 0, atol=1e-9)


def test_what_is_rotated() -> None:
    """Embeddings unless left out, kernels if asked for, vectors and norms never."""
    W = weight(12, 8)
    models = [W, W @ expm(generator_matrix(8, 1.0))]
    half, average = W @ expm(generator_matrix(8, 0.5)), sum(models) / 2
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_allclose(merged(models, name=name), half, atol=1e-6)
        found = merged(models, name=name, include_embeddings=False)
        np.testing.assert_allclose(found, average, atol=1e-14)
    kernels = [V.reshape(12, 2, 2, 2) for V in models]
    found = merged(kernels, name="conv.weight")
    np.testing.assert_allclose(found.reshape(12, 8), average, atol=1e-14)
    found = merged(kernels, name="conv.weight", rotate_conv=True)
    np.testing.assert_allclose(found.reshape(12, 8), half, atol=1e-6)
    found = merged(models, name="layers.0.input_layernorm.weight")
    np.testing.assert_allclose(found, average, atol=1e-14)
    found = merged([V[0] for V in models], name="norm.weight")
    np.testing.assert_allclose(found, average[0], atol=1e-14)


def test_stacks_of_experts_turn_one_by_one() -> None:
    W = np.stack([weight(9, 6, seed) for seed in (1, 2, 3)])
    turns = [generator_matrix(6, 1.0, seed) for seed in (4, 5, 6)]
    other = np.stack([V @ expm(L) for V, L in zip(W, turns, strict=True)])
    wanted = np.stack([V @ expm(L / 2) for V, L in zip(W, turns, strict=True)])
    found = merged([W, other], name="layers.0.mlp.experts.down_proj")
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_blocks_turn_by_themselves() -> None:
    W = weight(12, 8)
    L = np.zeros((8, 8))
    L[:4, :4], L[4:, 4:] = generator_matrix(4, 0.9, 1), generator_matrix(4, 0.4, 2)
    found = merged([W, W @ expm(L)], block=4)
    np.testing.assert_allclose(found, W @ expm(L / 2), atol=1e-6)


def test_half_precision_is_rounded_once_and_close() -> None:
    W = weight(16, 8)
    models = [W, W @ expm(generator_matrix(8, 0.6))]
    half = W @ expm(generator_matrix(8, 0.3))
    found = merged(models, dtype=torch.bfloat16, run_settings={}, anchor=1e-3)
    assert np.abs(found - half).max() < 0.02
    again = merged([torch.tensor(V).bfloat16().double().numpy() for V in models], anchor=1e-3)
    wanted = torch.tensor(again).bfloat16().double().numpy()
    assert (found != wanted).mean() < 0.02


def test_one_model_alone_is_itself() -> None:
    W = weight(6, 9)
    np.testing.assert_allclose(merged([W]), W, atol=1e-14)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(Exception, match="must not be negative"):
        merged([weight(4, 4), weight(4, 4, 2)], share=[1.0, -0.5])
