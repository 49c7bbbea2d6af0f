"""Every number of a diagnosis against numpy in float64, written from the formulas."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orthomerge.diagnostics.geometry import diagnose
from orthomerge.diagnostics.measurements import ANGLE_EDGES
from orthomerge.diagnostics.survey import plan_survey
from orthomerge.errors import (
    AdapterError,
    NumericalError,
    ProblemsError,
    RecipeError,
    TensorMismatchError,
)

NAME = "model.layers.0.mlp.up_proj.weight"


def tensor(array):
    return torch.tensor(array)


def polar(M):
    U, _, Vh = np.linalg.svd(M)
    return U @ Vh


def energy(W):
    X = W / np.linalg.norm(W, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(X)) for j in range(len(X)) if i != j]
    return sum(1 / np.linalg.norm(X[i] - X[j]) for i, j in pairs)


def oracle(W0, deltas, anchor):
    """Return what a diagnosis must find, by the plain formulas on dense matrices."""
    o, n = W0.shape
    eye, scale = np.eye(n), np.linalg.norm(W0)
    Rs = [polar(W0.T @ (W0 + D) + anchor * scale**2 / n * eye) for D in deltas]
    As = [np.linalg.solve(R + eye, R - eye) for R in Rs]
    S = sum(As)
    c = sum(np.linalg.norm(A) for A in As) / np.linalg.norm(S)
    Am = c / len(As) * S
    Rm = np.linalg.solve(eye - Am, eye + Am)
    mean = sum(deltas) / len(deltas)
    return {
        "residual": [
            np.linalg.norm(W0 + D - W0 @ R) / np.linalg.norm(D)
            for D, R in zip(deltas, Rs, strict=True)
        ],
        "noise": math.sqrt(1 - n / (2 * o)) if o >= n else math.sqrt(o / (2 * n)),
        "change": [np.linalg.norm(D) / scale for D in deltas],
        "norms": [np.linalg.norm(A) for A in As],
        # Eigenvalues come in conjugate pairs: every second of the sorted angles is one plane's.
        "angles": [np.sort(np.degrees(np.abs(np.angle(np.linalg.eigvals(R)))))[::-1] for R in Rs],
        "cosines": [
            [np.sum(A * B) / np.linalg.norm(A) / np.linalg.norm(B) for B in As] for A in As
        ],
        "change_cosines": [
            [np.sum(A * B) / np.linalg.norm(A) / np.linalg.norm(B) for B in deltas] for A in deltas
        ],
        "c": c,
        "agreement": np.linalg.norm(S) / sum(np.linalg.norm(A) for A in As),
        "merged_norm": np.linalg.norm(Am),
        "merged_angle": np.degrees(np.abs(np.angle(np.linalg.eigvals(Rm)))).max(),
        "moved": np.linalg.norm(W0 @ Rm - W0) / scale,
        "energy": [energy(W0), energy(W0 @ Rm), energy(W0 + mean)],
        "condition": np.linalg.cond(W0),
        "conflicts": [int(sum((D * mean).sum(axis=1) < 0)) for D in deltas],
    }


@pytest.mark.parametrize(("shape", "size"), [((12, 8), 0.2), ((8, 8), 0.1), ((5, 14), 0.3)])
def test_every_number_equals_the_formula(shape, size, write_folder) -> None:
    rs = np.random.RandomState(3)
    W0 = rs.standard_normal(shape)
    deltas = [size * rs.standard_normal(shape) for _ in range(3)]
    base = write_folder("base", {NAME: tensor(W0)})
    models = [write_folder(f"m{i}", {NAME: tensor(W0 + D)}) for i, D in enumerate(deltas)]
    layer = diagnose(models, base, anchor=1e-3).layers[0]
    want = oracle(W0, deltas, 1e-3)
    planes = shape[1] // 2

    def close(found, wanted, tolerance=1e-9):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)

    close([m.residual_fraction for m in layer.models], want["residual"])
    close([m.noise_level for m in layer.models], want["noise"])
    close([m.change for m in layer.models], want["change"])
    close([m.generator_norm for m in layer.models], want["norms"])
    close([m.largest_angle for m in layer.models], [a[0] for a in want["angles"]], 1e-6)
    close(
        [m.mean_angle for m in layer.models], [a.sum() / 2 / planes for a in want["angles"]], 1e-6
    )
    assert [m.retries for m in layer.models] == [0, 0, 0]
    assert [m.conflict_rows for m in layer.models] == want["conflicts"]
    assert all(sum(m.angle_counts) == planes for m in layer.models)
    close(layer.generator_cosines, want["cosines"])
    close(layer.change_cosines, want["change_cosines"])
    close(layer.correction, want["c"])
    close(layer.agreement, want["agreement"])
    close(layer.merged.generator_norm, want["merged_norm"])
    close(layer.merged.largest_angle, want["merged_angle"], 1e-6)
    close(layer.merged.moved, want["moved"])
    close(layer.merged.mean_change, np.mean(want["change"]))
    close([layer.energy.base, layer.energy.rotated, layer.energy.mean_merge], want["energy"])
    close(layer.condition, want["condition"], 1e-6)
    close(layer.merged.least_one_plus_cosine, 1 + math.cos(math.radians(want["merged_angle"])))
    assert layer.merged.determinant == 1
    assert layer.merged.orthogonality < 1e-13
    assert layer.base_norm == pytest.approx(np.linalg.norm(W0))


def test_published_example_without_an_anchor() -> None:
    """The numbers were computed with the authors' own functions in float64."""
    rs = np.random.RandomState(7)
    W0 = rs.standard_normal((12, 8))
    models = [{NAME: tensor(W0 + 0.05 * rs.standard_normal((12, 8)))} for _ in range(3)]
    layer = diagnose(models, {NAME: tensor(W0)}, anchor=0.0).layers[0]
    found = [m.generator_norm for m in layer.models]
    assert found == pytest.approx([0.045111163112831, 0.040707653831102, 0.042819008689840])
    assert layer.correction == pytest.approx(1.785798839877639)
    assert layer.merged.largest_angle == pytest.approx(3.00952, abs=1e-5)
    assert layer.energy.base == pytest.approx(98.21322452589877)
    assert layer.energy.rotated == pytest.approx(layer.energy.base, rel=1e-12)
    assert [m.conflict_rows for m in layer.models] == [0, 1, 1]


def test_blocks_are_fitted_one_by_one() -> None:
    rs = np.random.RandomState(5)
    W0, D = rs.standard_normal((9, 8)), 0.2 * rs.standard_normal((9, 8))
    model = diagnose([{NAME: tensor(W0 + D)}], {NAME: tensor(W0)}, block=4).layers[0].models[0]
    lam = 1e-3 * np.linalg.norm(W0) ** 2 / 8
    left = 0.0
    for cut in (slice(0, 4), slice(4, 8)):
        R = polar(W0[:, cut].T @ (W0 + D)[:, cut] + lam * np.eye(4))
        left += np.linalg.norm((W0 + D)[:, cut] - W0[:, cut] @ R) ** 2
    assert model.residual_fraction == pytest.approx(math.sqrt(left) / np.linalg.norm(D))
    assert model.noise_level == pytest.approx(math.sqrt(1 - 4 / 18))
    assert sum(model.angle_counts) == 4


def test_a_known_angle_lands_in_its_bin() -> None:
    W0 = torch.eye(4, dtype=torch.float64)
    phi = math.radians(120)
    R = torch.eye(4, dtype=torch.float64)
    R[:2, :2] = torch.tensor([[math.cos(phi), math.sin(phi)], [-math.sin(phi), math.cos(phi)]])
    model = diagnose([{NAME: W0 @ R}], {NAME: W0}, anchor=0.0).layers[0].models[0]
    assert model.largest_angle == pytest.approx(120)
    assert model.mean_angle == pytest.approx(60)
    assert model.obtuse_fraction == 0.5
    at = next(i for i, count in enumerate(model.angle_counts) if i and count)
    assert ANGLE_EDGES[at - 1] < 120 <= ANGLE_EDGES[at]
    assert model.angle_counts[0] == 1


def lora(folder, B, A, config="{}"):
    folder.mkdir()
    key = f"base_model.model.{NAME.removesuffix('.weight')}.lora_"
    tensors = {f"{key}A.weight": tensor(A), f"{key}B.weight": tensor(B)}
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": len(A), "lora_alpha": 2 * len(A), **json.loads(config)}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def test_a_lora_adapter_is_measured_as_its_change(tmp_path) -> None:
    rs = np.random.RandomState(1)
    W0, B, A = rs.standard_normal((8, 6)), rs.standard_normal((8, 2)), rs.standard_normal((2, 6))
    base = {NAME: tensor(W0), "model.layers.1.mlp.up_proj.weight": tensor(W0)}
    found = diagnose([lora(tmp_path / "a", B, A), {**base, NAME: tensor(W0 + 2 * B @ A)}], base)
    adapter, full = found.layers[0].models
    assert adapter.residual_fraction == pytest.approx(full.residual_fraction)
    assert adapter.change == pytest.approx(np.linalg.norm(2 * B @ A) / np.linalg.norm(W0))
    assert found.layers[0].generator_cosines[0][1] == pytest.approx(1)
    assert found.layers[1].models[0].change == 0
    only = diagnose([tmp_path / "a"], base)
    assert [layer.name for layer in only.layers] == [NAME]
    assert only.skipped == {"that no adapter changes": 1}


def oft(folder, *packed, terms=5, module="up"):
    folder.mkdir()
    tensors = {
        f"base_model.model.layers.{i}.{module}.oft_R.weight": tensor(p)
        for i, p in enumerate(packed)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "peft_version": "0.19.0"}
    config["num_cayley_neumann_terms"] = terms
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def skew(p):
    Q = np.zeros((len(p), 4, 4))
    Q[:, *np.triu_indices(4, 1)] = p
    return Q - Q.transpose(0, 2, 1)


def test_rotation_adapters_need_no_base(tmp_path) -> None:
    """Norms and c are those that the authors' own functions give."""
    rs = np.random.RandomState(0)
    packed = [0.1 * rs.standard_normal((2, 6)) for _ in range(3)]
    found = diagnose([oft(tmp_path / f"a{i}", p) for i, p in enumerate(packed)])
    layer = found.layers[0]
    norms = [0.5819770441137797, 0.4949186314958869, 0.5802886550813604]
    assert [m.generator_norm for m in layer.models] == pytest.approx(norms)
    assert layer.correction == pytest.approx(1.3738635727699386)
    assert layer.agreement == pytest.approx(1 / 1.3738635727699386)
    assert layer.merged.generator_norm == pytest.approx(0.5523947768970422)
    first, second = skew(packed[0]), skew(packed[1])
    assert layer.generator_cosines[0][1] == pytest.approx(
        np.sum(first * second) / np.linalg.norm(first) / np.linalg.norm(second)
    )
    model = layer.models[0]
    theta = np.linalg.norm(first, 2, axis=(1, 2)).max()
    assert model.theta == pytest.approx(theta)
    assert model.largest_angle == pytest.approx(np.degrees(2 * np.arctan(theta)))
    I = np.eye(4)  # noqa: E741
    K = [I + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q for Q in first]
    error = max(np.linalg.norm(k @ k.T - I) / 2 for k in K)
    assert model.orthogonality == pytest.approx(error, rel=1e-6)
    assert layer.energy is layer.condition is layer.merged.moved is model.change is None


def test_an_adapter_that_lacks_a_module_counts_as_unturned(tmp_path) -> None:
    p = 0.1 * np.random.RandomState(0).standard_normal((3, 6))
    found = diagnose([oft(tmp_path / "a", p, p), oft(tmp_path / "b", p)])
    assert found.layers[0].models[1] is not None
    lonely = found.layers[1]
    assert lonely.models[1] is None
    assert lonely.generator_cosines == ((1.0, None), (None, None))
    assert lonely.merged.generator_norm == pytest.approx(lonely.models[0].generator_norm / 2)


def test_a_reflection_has_no_generator_but_is_a_change_of_its_base(tmp_path) -> None:
    """One Householder reflection; with the base the anchor is raised until R is a rotation."""
    rs = np.random.RandomState(0)
    u, W0 = rs.standard_normal((6, 1)), rs.standard_normal((9, 6))
    key = f"base_model.model.{NAME.removesuffix('.weight')}.hra_u"
    save_file({key: tensor(u)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "HRA", "r": 1}')
    with pytest.raises(AdapterError, match="is no rotation"):
        diagnose([tmp_path])
    layer = diagnose([tmp_path], {NAME: tensor(W0)}).layers[0]
    D = -2 * W0 @ u @ u.T / (u.T @ u)
    assert layer.models[0].change == pytest.approx(np.linalg.norm(D) / np.linalg.norm(W0))
    assert layer.models[0].retries > 0
    assert layer.merged.determinant == 1


def test_adapters_of_different_widths_do_not_mix(tmp_path) -> None:
    rs = np.random.RandomState(0)
    a = oft(tmp_path / "a", 0.1 * rs.standard_normal((3, 6)))
    b = oft(tmp_path / "b", 0.1 * rs.standard_normal((2, 6)))
    with pytest.raises(AdapterError, match="same space"):
        diagnose([a, b])


def test_the_matrices_of_a_stack_are_layers_of_their_own() -> None:
    rs = np.random.RandomState(2)
    name = "layers.0.mlp.experts.up_proj"
    W0, D = rs.standard_normal((2, 6, 4)), 0.1 * rs.standard_normal((2, 6, 4))
    found = diagnose([{name: tensor(W0 + D)}], {name: tensor(W0)})
    assert [layer.name for layer in found.layers] == [f"{name}[0]", f"{name}[1]"]
    for at, layer in enumerate(found.layers):
        want = oracle(W0[at], [D[at]], 1e-3)
        assert layer.models[0].residual_fraction == pytest.approx(want["residual"][0])


def test_unchanged_layers_and_zero_layers() -> None:
    W0 = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    base = {"a.weight": W0, "zero.weight": torch.zeros(6, 4)}
    found = diagnose([base, base], base)
    assert [layer.name for layer in found.layers] == ["a.weight"]
    assert found.skipped == {"that are zero in the base": 1}
    layer = found.layers[0]
    assert layer.models[0].residual_fraction is layer.models[0].over_noise is None
    assert layer.merged.moved == 0
    assert layer.agreement is None


def test_embeddings_and_names_are_chosen() -> None:
    W = torch.ones(6, 4)
    base = {"embed_tokens.weight": W, "layers.0.up.weight": W, "layers.1.up.weight": W}
    base |= {"layers.0.norm.weight": torch.ones(4), "conv.weight": torch.ones(2, 2, 3, 3)}
    found = plan_survey([base], base)
    assert [layer.name for layer in found.layers] == ["layers.0.up.weight", "layers.1.up.weight"]
    assert found.skipped == {"embeddings": 1, "vectors and norms": 1, "convolutions": 1}
    assert len(plan_survey([base], base, include_embeddings=True).layers) == 3
    assert len(plan_survey([base], base, layers="layers.1.*").layers) == 1


def test_progress_adds_up_to_what_is_read() -> None:
    base = {f"layers.{i}.up.weight": torch.randn(6, 4) for i in range(3)}
    seen = []
    diagnose([base, base], base, advance=seen.append)
    assert sum(seen) == plan_survey([base, base], base).read_bytes == 3 * 3 * 6 * 4 * 4
    assert len(seen) == 3


def test_json_has_no_infinities() -> None:
    W0 = torch.ones(4, 4, dtype=torch.float64)
    D = torch.eye(4, dtype=torch.float64)
    found = diagnose([{NAME: W0 + D}], {NAME: W0})
    assert found.layers[0].condition == math.inf
    facts = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert facts["layers"][0]["condition"] is None
    assert facts["layers"][0]["parameters"] == 16
    assert facts["layers"][0]["models"][0]["over_noise"] == found.layers[0].models[0].over_noise
    assert facts["angle_edges"][-1] == pytest.approx(180)


def test_half_precision_is_lifted() -> None:
    rs = np.random.RandomState(4)
    W0 = tensor(rs.standard_normal((8, 6))).bfloat16()
    W = (W0.float() + 0.3 * tensor(rs.standard_normal((8, 6))).float()).bfloat16()
    model = diagnose([{NAME: W}], {NAME: W0}).layers[0].models[0]
    exact = W0.double().numpy()
    want = oracle(exact, [W.double().numpy() - exact], 1e-3)
    assert model.residual_fraction == pytest.approx(want["residual"][0], rel=1e-5)


def test_errors_name_what_is_wrong(tmp_path) -> None:
    base = {"a.weight": torch.ones(6, 4), "b.weight": torch.ones(6, 4)}
    with pytest.raises(RecipeError, match="without its base"):
        diagnose([base])
    with pytest.raises(RecipeError, match="no model"):
        diagnose([], base)
    with pytest.raises(RecipeError, match="no layer"):
        diagnose([base], base, layers="nowhere*")
    with pytest.raises(RecipeError, match="block size") as refused:
        diagnose([base], {"a.weight": base["a.weight"]}, block=3)
    assert refused.value.exit_code == 4
    with pytest.raises(TensorMismatchError, match="shapes differ") as refused:
        diagnose([{**base, "a.weight": torch.ones(6, 5)}], base)
    assert refused.value.exit_code == 3
    with pytest.raises(ProblemsError) as several:
        diagnose([{"a.weight": torch.ones(6, 5)}], base)
    assert len(several.value.problems) == 2
    broken = {**base, "b.weight": torch.full((6, 4), math.nan)}
    with pytest.raises(NumericalError, match="NaN") as refused:
        diagnose([broken], base)
    assert refused.value.tensor == "b.weight"
    p = np.zeros((2, 6))
    with pytest.raises(RecipeError, match="base is an adapter"):
        diagnose([base], oft(tmp_path / "a", p))
