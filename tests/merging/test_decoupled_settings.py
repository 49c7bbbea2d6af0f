"""Every parameter of the decoupled merge does what it says, or is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from decoupled_models import (
    FP64,
    NAME,
    ROTATION_ONLY,
    cayley,
    corrected,
    inverse_cayley,
    merged,
    noisy,
    split_oracle,
    weight,
)

from orthomerge import merge, plan
from orthomerge.errors import NumericalError, OrthoMergeError


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


def test_what_the_linear_algebra_refuses_names_the_tensor(monkeypatch) -> None:
    def refuse(*_, **__):
        raise NumericalError("no fit")

    monkeypatch.setattr("orthomerge.merging.steps.decoupling.procrustes_right", refuse)
    W0 = weight(9, 6, 3.0, 1)
    with pytest.raises(NumericalError, match=f"'{NAME}': no fit"):
        merged(W0, noisy(W0, 2, 0.05, 2))


@pytest.mark.parametrize("name", ["strength", "anchor", "zero_guard"])
def test_infinite_settings_are_refused_in_the_plan(name) -> None:
    W0 = weight(9, 6, 3.0, 1)
    with pytest.raises(OrthoMergeError, match=name):
        merged(W0, noisy(W0, 2, 0.05, 2), **{name: math.inf})


def test_only_the_surveyed_parameters_must_be_one_for_all_tensors() -> None:
    models = [{n: torch.randn(8, 8) for n in ("a.weight", "b.weight")} for _ in range(2)]
    base = {n: torch.randn(8, 8) for n in ("a.weight", "b.weight")}
    rules = [{"match": "a.*", "value": 1e-2}, {"value": 1e-3}]
    residual = {"method": "ties", "scope": "model"}
    settings = {"base": base, "method": "orthomerge", "residual": residual}
    assert merge(models, anchor=rules, **settings).tensors.keys() == base.keys()
    varied = [{"match": "a.*", "value": residual}, {"value": {**residual, "density": 0.5}}]
    with pytest.raises(OrthoMergeError, match="must have one value"):
        plan(models, **{**settings, "residual": varied})
