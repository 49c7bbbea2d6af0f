"""dare, dare-ties and della: what the masks do on average, and that only the seed decides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import rankdata

from orthomerge import merge
from orthomerge.errors import RecipeError
from orthomerge.merging.draws import Draws
from orthomerge.merging.methods.della import della
from orthomerge.merging.planning import draft
from orthomerge.merging.steps.dropping import dropped_by_rank, mean_ranks

RANDOM = ["dare", "dare-ties", "della"]
NAME = "layers.0.up.weight"


def models(*shape: int, count: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base, [base + 0.1 * rng.standard_normal(shape) for _ in range(count)]


def merged(method, base, experts, **settings):
    found = merge(
        [{NAME: torch.tensor(W)} for W in experts],
        base={NAME: torch.tensor(base)},
        method=method,
        **settings,
    )
    return found.tensors[NAME].numpy()


def masks(method, count, shape, probability, seed=0):
    """Which entries each model keeps, from the promised numbers."""
    keys = [f"state dict#{at}" for at in range(count)]
    draws = Draws(seed, method, NAME, keys)
    numbers = [draws.uniform(at, torch.empty(shape)).double().numpy() for at in range(count)]
    return [u < p for u, p in zip(numbers, probability, strict=True)]


def elected(updates, weights, normalize):
    weighted = [w * T for w, T in zip(weights, updates, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1.0, -1.0)
    agree = [u * sign > 0 for u in weighted]
    total = sum(np.where(a, u, 0.0) for u, a in zip(weighted, agree, strict=True))
    if not normalize:
        return total
    bottom = sum(abs(w) * a for w, a in zip(weights, agree, strict=True))
    return np.divide(total, bottom, out=np.zeros_like(total), where=bottom > 0)


def keep_probabilities(D, density, epsilon):
    k = np.stack([rankdata(np.abs(row)) for row in D])
    n = D.shape[1]
    return density - epsilon + 2 * epsilon * (k - 1) / (n - 1)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0]])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_dare_equals_its_formula(weights, density) -> None:
    base, experts = models(20, 15)
    kept = masks("dare", 3, base.shape, [density] * 3, seed=4)
    D = [W - base for W in experts]
    update = sum(w * m * d / density for w, m, d in zip(weights, kept, D, strict=True))
    found = merged("dare", base, experts, weights=weights, density=density, scale=0.6, seed=4)
    np.testing.assert_allclose(found, base + 0.6 * update, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0]])
def test_dare_ties_equals_its_formula(weights, normalize) -> None:
    base, experts = models(20, 15)
    kept = masks("dare-ties", 3, base.shape, [0.3] * 3)
    T = [m * (W - base) / 0.3 for m, W in zip(kept, experts, strict=True)]
    wanted = base + 0.6 * elected(T, weights, normalize)
    settings = {"density": 0.3, "scale": 0.6, "normalize": normalize}
    found = merged("dare-ties", base, experts, weights=weights, **settings)
    np.testing.assert_allclose(found, wanted, atol=1e-14)


@pytest.mark.parametrize("rescale", ["probability", "norm"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.29), (0.9, 0.1), (0.4, 0)])
def test_della_equals_its_formula(rescale, normalize, density, epsilon) -> None:
    base, experts = models(12, 25)
    weights = [0.5, -1.0, 2.0]
    D = [W - base for W in experts]
    P = [keep_probabilities(d, density, epsilon) for d in D]
    T = [m * d for m, d in zip(masks("della", 3, base.shape, P), D, strict=True)]
    if rescale == "probability":
        T = [t / p for t, p in zip(T, P, strict=True)]
    else:
        T = [t * np.abs(d).sum() / np.abs(t).sum() for t, d in zip(T, D, strict=True)]
    settings = {"density": density, "epsilon": epsilon, "rescale": rescale}
    found = merged("della", base, experts, weights=weights, normalize=normalize, **settings)
    np.testing.assert_allclose(found, base + elected(T, weights, normalize), atol=1e-13)


def test_at_density_one_nothing_is_random() -> None:
    base, experts = models(20, 15)
    for method, other, settings in [
        ("dare", "task-arithmetic", {}),
        ("dare-ties", "ties", {}),
        ("della", "ties", {"normalize": True, "epsilon": 0}),
        ("magnitude-prune", "task-arithmetic", {}),
    ]:
        found = merged(method, base, experts, density=1, scale=0.7, **settings)
        wanted_settings = {"density": 1} if other == "ties" else {}
        wanted = merged(other, base, experts, scale=0.7, **wanted_settings)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("density", [0.1, 0.7])
def test_the_mean_over_the_masks_is_the_sum_and_the_variance_is_known(density) -> None:
    base, change = np.zeros((300, 300)), np.full((300, 300), 2.0)
    update = merged("dare", base, [change, change], weights=[1.0, 3.0], density=density)
    variance = (1 / density - 1) * (2.0**2 + 6.0**2)
    assert abs(update.mean() - 8.0) < 4 * (variance / update.size) ** 0.5
    assert update.var() == pytest.approx(variance, rel=0.05)  # so the masks are independent


def test_small_tensors_are_not_lost() -> None:
    """⌊0.1 · 4⌋ = 0 entries; each of the 4 is kept one time in ten all the same."""
    base, change = np.zeros(4), np.ones(4)
    updates = [merged("dare", base, [change], density=0.1, seed=seed) for seed in range(200)]
    assert np.mean(updates) == pytest.approx(1.0, abs=0.45)  # 4 standard deviations
    assert set(np.unique(updates).round(9)) == {0.0, 10.0}


def test_della_keeps_large_entries_more_often_and_the_sum_on_average() -> None:
    D = torch.arange(1.0, 101.0).repeat(4000, 1)
    D[:, ::2] *= -1
    kept = dropped_by_rank(D, Draws(0, "della", "w", ["a"]), 0, 0.5, 0.15, "probability")
    frequency = (kept != 0).double().mean(0)
    wanted = 0.35 + 0.3 * torch.arange(100.0).double() / 99
    assert (frequency - wanted).abs().max() < 4.5 * (0.25 / 4000) ** 0.5
    assert ((kept.double() / D).mean(0) - 1).abs().max() < 4.5 * (1.9 / 4000) ** 0.5


def test_della_keeps_the_l1_norm_when_asked() -> None:
    base, (W,) = models(40, 30, count=1)
    update = merged("della", base, [W], rescale="norm") - base
    assert np.abs(update).sum() == pytest.approx(np.abs(W - base).sum())
    assert (update == 0).mean() == pytest.approx(0.5, abs=0.06)


def test_della_ranks_a_vector_as_one_row_and_a_kernel_by_output() -> None:
    draws = Draws(0, "della", "w", ["a"])
    D = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    arguments = {"weights": [1.0], "draws": draws, "density": 0.4}
    kernel = della(torch.zeros_like(D), [D], role="convolution", **arguments)
    flat = della(torch.zeros(3, 16), [D.reshape(3, 16)], **arguments)
    assert torch.equal(kernel.reshape(3, 16), flat)
    stack = della(torch.zeros(3, 8, 2), [D.reshape(3, 8, 2)], role="stack", **arguments)
    rows = della(torch.zeros(24, 2), [D.reshape(24, 2)], **arguments)
    assert torch.equal(stack.reshape(24, 2), rows)
    vector = della(torch.zeros(48), [D.reshape(-1)], **arguments)
    assert torch.equal(vector, della(torch.zeros(1, 48), [D.reshape(1, -1)], **arguments)[0])


def test_della_does_not_depend_on_how_many_rows_are_ranked_at_a_time(monkeypatch) -> None:
    base, experts = models(30, 11)
    wanted = merged("della", base, experts)
    monkeypatch.setattr("orthomerge.merging.steps.dropping._ENTRIES_AT_A_TIME", 25)
    assert (merged("della", base, experts) == wanted).all()


def test_mean_ranks_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 4, (6, 9)), rng.random((3, 1)), np.zeros((2, 5))):
        wanted = np.stack([rankdata(row) for row in values])
        found = mean_ranks(torch.tensor(values, dtype=torch.float64))
        np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.15, 0.15), (0.95, 0.1)])
def test_della_refuses_what_are_no_probabilities_before_it_starts(density, epsilon) -> None:
    base, experts = models(4, 4, count=2)
    settings = {"density": density, "epsilon": epsilon}
    with pytest.raises(RecipeError, match="probabilities"):
        merged("della", base, experts, **settings)
    residual = {"method": "della", **settings}
    with pytest.raises(RecipeError, match="probabilities"):
        merged("orthomerge-decoupled", base, experts, residual=residual)
    D = torch.ones(2, 2)
    with pytest.raises(RecipeError, match="probabilities"):
        della(D, [D], weights=[1.0], draws=Draws(0, "della", "w", ["a"]), **settings)


@pytest.mark.parametrize("method", RANDOM)
def test_only_the_seed_decides(method, monkeypatch) -> None:
    """Not the pieces, the threads, or the method around it."""
    base, experts = models(40, 30)
    wanted = merged(method, base, experts, seed=5)
    assert (merged(method, base, experts, seed=5, run_settings={"workers": 3}) == wanted).all()
    inside = {"residual": {"method": method}, "gate": "auto"}
    outer = merged("orthomerge-decoupled", base, experts, seed=5, **inside)
    np.testing.assert_allclose(outer, wanted, atol=1e-15)  # white noise: nothing is rotated
    monkeypatch.setattr(draft, "_CPU_PIECE", 77)
    assert (merged(method, base, experts, seed=5) == wanted).all()
    assert (merged(method, base, experts, seed=6) != wanted).mean() > 0.3


@pytest.mark.parametrize("method", RANDOM)
def test_masks_follow_named_models(method, tmp_path) -> None:
    base, experts = models(20, 15, count=2)
    for name, W in zip(["base", "code", "maths"], [base, *experts], strict=True):
        save_file({NAME: torch.tensor(W)}, tmp_path / f"{name}.safetensors")

    def of(*names, **settings):
        paths = [str(tmp_path / f"{name}.safetensors") for name in names]
        found = merge(paths, base=str(tmp_path / "base.safetensors"), method=method, **settings)
        return found.tensors[NAME].numpy()

    one = of("code", "maths", weights=[1.0, 0.5])
    other = of("maths", "code", weights=[0.5, 1.0])
    np.testing.assert_allclose(one, other, atol=1e-14)
