"""Layer by layer, the decoupled merge rotates only where there is a rotation to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoupled_models import (
    NAME,
    big,
    cayley,
    facts_of,
    fitted,
    inverse_cayley,
    mean_of,
    merged,
    noisy,
    run,
    skew,
)
from scipy.linalg import expm

from orthomerge import merge


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
