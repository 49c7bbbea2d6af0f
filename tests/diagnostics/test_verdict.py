"""Verdicts on changes whose nature is known: noise, rotations, mixtures, nothing."""

from __future__ import annotations

import pytest
import torch
from test_geometry import oft

from orthomerge.diagnostics.geometry import diagnose
from orthomerge.diagnostics.verdict import judge

SHAPES = {"q_proj": (32, 32), "k_proj": (16, 32), "up_proj": (48, 32), "down_proj": (32, 48)}


class Source:
    """Random matrices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def rotation(self, n: int) -> torch.Tensor:
        """Return a rotation by angles of ten degrees or so, by the matrix exponential."""
        K = 0.02 * self.normal(n, n)
        return torch.linalg.matrix_exp((K - K.T).double()).float()

    def model(self, layers: int = 3) -> dict[str, torch.Tensor]:
        return {
            f"model.layers.{at}.{name}.weight": self.normal(*shape)
            for at in range(layers)
            for name, shape in SHAPES.items()
        }


@pytest.fixture(params=[0, 1, 2])
def source(request) -> Source:
    return Source(request.param)


@pytest.mark.parametrize("rank", [None, 1, 4])
def test_noise_is_not_rotational_whatever_its_rank(source, rank) -> None:
    base = source.model()

    def noise(W):
        if rank is None:
            return 0.05 * source.normal(*W.shape)
        return 0.05 * source.normal(len(W), rank) @ source.normal(rank, W.shape[1])

    said = judge(diagnose([{k: W + noise(W) for k, W in base.items()}], base))
    assert said.kind == "not-rotational"
    assert not said.matters
    assert said.share < 0.1
    assert said.text.startswith("Not rotational")
    assert "use tsv-m" in said.text


def test_noise_on_an_ill_conditioned_base_is_not_rotational(source) -> None:
    base = {}
    for name, W in source.model(1).items():
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        base[name] = 10 * U @ torch.diag(torch.logspace(0, -3, U.shape[1])) @ Vh
    model = {k: W + 0.01 * source.normal(*W.shape) for k, W in base.items()}
    assert judge(diagnose([model], base)).kind == "not-rotational"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_is_recognised_as_one(source, dtype) -> None:
    base = {k: W.to(dtype) for k, W in source.model().items()}
    turned = {k: (W.float() @ source.rotation(W.shape[1])).to(dtype) for k, W in base.items()}
    said = judge(diagnose([turned], base))
    assert said.kind == "rotation"
    assert said.matters
    assert (said.rotational_layers, said.changed_layers) == (12, 12)
    assert said.share == 1
    assert "exact rotation" in said.text


@pytest.mark.parametrize(
    ("angle", "low", "high", "kind"),
    [(3e-3, 0.35, 0.6, "rotational"), (1e-4, 0.9, 1.1, "not-rotational")],
)
def test_rounding_to_bf16_hides_small_rotations(source, angle, low, high, kind) -> None:
    W = (source.normal(128, 128) / 12).bfloat16()
    K = source.normal(128, 128) * angle / 16
    turned = (W.double() @ torch.linalg.matrix_exp((K - K.T).double())).bfloat16()
    found = diagnose([{"up.weight": turned}], {"up.weight": W})
    assert low < found.layers[0].models[0].over_noise < high
    assert judge(found).kind == kind


def test_rotations_with_noise_on_top_are_rotational(source) -> None:
    base = source.model()
    model = {
        k: W @ source.rotation(W.shape[1]) + 0.02 * source.normal(*W.shape) for k, W in base.items()
    }
    said = judge(diagnose([model], base))
    assert (said.kind, said.rotational_layers) == ("rotational", 12)


@pytest.mark.parametrize(
    ("size", "kind"),
    [(0.02, "rotational"), (0.3, "partly-rotational"), (1.5, "not-rotational")],
)
def test_what_counts_is_how_much_of_the_change_is_rotational(source, size, kind) -> None:
    """One layer in three is turned; the others get noise of different sizes."""
    base = source.model()
    model = {
        k: W @ source.rotation(W.shape[1])
        if ".layers.1." in k
        else W + size * source.normal(*W.shape)
        for k, W in base.items()
    }
    said = judge(diagnose([model], base))
    assert said.rotational_layers == 4
    assert said.kind == kind
    assert said.matters == (kind != "not-rotational")
    assert "4 of 12 layers" in said.text


def test_the_share_is_of_the_changes_themselves(source) -> None:
    """A change that is small beside a large base counts with its own norm."""
    small, large = source.normal(32, 32), 10 * source.normal(32, 32)
    base = {"a.weight": small, "b.weight": large}
    model = {
        "a.weight": small @ source.rotation(32),
        "b.weight": large + 0.2 * source.normal(32, 32),
    }
    turned, noisy = (float((model[k] - base[k]).square().sum()) for k in base)
    said = judge(diagnose([model], base))
    assert said.rotational_layers == 1
    assert said.share == pytest.approx(turned / (turned + noisy), rel=1e-4)


def test_models_are_told_apart(source) -> None:
    base = source.model(1)
    turned = {k: W @ source.rotation(W.shape[1]) for k, W in base.items()}
    noisy = {k: W + 0.05 * source.normal(*W.shape) for k, W in base.items()}
    said = judge(diagnose([noisy, turned], base))
    assert said.by_model == (0, 4)
    assert (said.rotational_updates, said.changed_updates) == (4, 8)
    assert "by model 0, 4" in said.text


def test_the_margin_decides(source) -> None:
    base = source.model(1)
    model = {
        k: W @ source.rotation(W.shape[1]) + 0.05 * source.normal(*W.shape) for k, W in base.items()
    }
    found = diagnose([model], base)
    assert judge(found, margin=0.1).rotational_layers == 4
    assert judge(found, margin=0.9).rotational_layers == 0


def test_small_layers_must_beat_noise_by_its_spread() -> None:
    """A tenth below the noise level is within two deviations of noise in 16 x 32 weights."""
    found = [
        judge(
            diagnose(
                [{"up.weight": W + 0.05 * Source(100 + seed).normal(16, 32)}], {"up.weight": W}
            )
        )
        for seed in range(60)
        for W in [Source(seed).normal(16, 32)]
    ]
    assert sum(said.rotational_layers for said in found) <= 1


def test_nothing_changed(source) -> None:
    base = source.model(1)
    said = judge(diagnose([base], base))
    assert (said.kind, said.matters) == ("unchanged", False)


def test_adapters_are_rotations_by_construction(tmp_path) -> None:
    p = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).numpy()
    said = judge(diagnose([oft(tmp_path / "small", 0.05 * p, 0 * p)]))
    assert (said.kind, said.rotational_layers, said.by_model) == ("rotation", 1, (1,))
    assert "by construction in 1 modules" in said.text
    assert "off by" not in said.text
    said = judge(diagnose([oft(tmp_path / "large", 0.4 * p)]))
    assert "truncated series is off by" in said.text
    assert judge(diagnose([oft(tmp_path / "none", 0 * p)])).kind == "unchanged"
