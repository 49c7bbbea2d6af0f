"""Orthogonal–residual decoupling against the reference recipe written out in numpy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from reference_decoupling import (
    conflict_rows,
    decouple,
    inverse_cayley,
    is_rotated,
    merge_models,
    procrustes,
    sum_merge,
    targets,
    ties_merge,
    tsv_merge,
)

from orthomerge import merge

NAME = "layers.0.up.weight"
VARIANTS = ("global", "conflict-aware")
SETTINGS = {
    "method": "orthomerge-decoupled",
    "mode": "reproduce",
    "run_settings": {"compute_dtype": "float64"},
}
RESIDUALS = {
    "sum": ({"method": "task-arithmetic", "scale": 0.2}, functools.partial(sum_merge, scale=0.2)),
    "ties": (
        {"method": "ties", "scope": "model"},
        functools.partial(ties_merge, keep=0.2, scale=1.0),
    ),
    "tsv": ({"method": "tsv-m"}, functools.partial(tsv_merge, scale=1.0)),
}


def same_count(numel: int) -> float:
    """The density that keeps as many as the reference: what reaches its int(0.8 n)-th smallest."""
    return (numel - int(0.8 * numel) + 1) / numel


# Numbers of one small case that the published functions gave.


def small_case() -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.RandomState(7)
    W0 = rng.standard_normal((12, 8))
    return W0, [W0 + 0.05 * rng.standard_normal((12, 8)) for _ in range(3)]


GLOBAL = {
    "norms": [0.045111163112831, 0.040707653831102, 0.042819008689840],
    "c": 1.785798839877639,
    "merged_norm": 0.042879275211258,
    "residuals": [0.388920895642812, 0.388712676044512, 0.455339474411297],
    "row": [0.9997180558492426, -0.008808034728840935, -0.01428760118709482],
    "out_norm": 9.879736800977446,
    "out": [1.6943509135609602, -0.4585378316842922, -0.007762682169558872],
    "moved": 0.2825574957663338,
}
CONFLICT_AWARE = {
    "norms": [0.0, 0.011339271828937, 0.006362211321230],
    "c": 1.275058871243732,
    "merged_norm": 0.005900494383389,
    "residuals": [0.456872334757246, 0.441430559306184, 0.514952307579368],
    "row": [0.9999858467740697, 0.0031710511475181594, -0.00179820096803378],
    "out_norm": 9.878400656860766,
    "out": [1.7102564545792305, -0.451594216061565, 0.011520858890072538],
    "moved": 0.1663218394852051,
}
KNOWN = [("global", GLOBAL), ("conflict-aware", CONFLICT_AWARE)]


@pytest.mark.parametrize(("variant", "known"), KNOWN, ids=VARIANTS)
def test_the_oracle_gives_the_known_numbers(variant, known) -> None:
    W0, experts = small_case()
    found = decouple(W0, experts, variant)
    # the norm of a vanishing generator is what rounding left, so c feels 1e-14 of it
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-14)
    close([np.linalg.norm(A) for A in found["generators"]], known["norms"])
    close(found["c"], known["c"])
    close(np.linalg.norm(found["merged"]), known["merged_norm"])
    close([np.linalg.norm(r) for r in found["residuals"]], known["residuals"])
    close(found["R_m"][0, :3], known["row"])
    out = found["rotated"] + 0.2 * sum(found["residuals"])
    close(np.linalg.norm(out), known["out_norm"])
    close(out[0, :3], known["out"])
    close(np.linalg.norm(out - W0), known["moved"], atol=1e-14)


def test_the_oracle_gives_the_known_residual_merges() -> None:
    W0, experts = small_case()
    assert conflict_rows(W0, experts) == [0, 1, 1]
    found = decouple(W0, experts, "global")
    residuals = [{NAME: r} for r in found["residuals"]]
    ties = ties_merge(residuals, 0.2, 1.0)[NAME]
    assert np.linalg.norm(ties) == pytest.approx(0.5124013837926964, abs=1e-14)
    assert np.count_nonzero(ties) == 48
    assert ties.sum() == pytest.approx(0.09680663794692054, abs=1e-14)
    assert np.linalg.norm(found["rotated"] + ties) == pytest.approx(9.916292834734596, abs=1e-14)
    tsv = tsv_merge(residuals, 1.0)[NAME]
    assert np.linalg.norm(tsv) == pytest.approx(0.5329036309, abs=1e-5)
    np.testing.assert_allclose(tsv[0, :3], [0.1552916765, 0.0167030096, -0.0821027383], atol=1e-5)
    assert np.linalg.norm(found["rotated"] + tsv) == pytest.approx(9.889764780, abs=1e-5)


# The engine.


def run(base, experts, **settings):
    def tensors(model):
        return {name: torch.tensor(value) for name, value in model.items()}

    return merge([tensors(e) for e in experts], base=tensors(base), **{**SETTINGS, **settings})


@pytest.mark.parametrize(("variant", "known"), KNOWN, ids=VARIANTS)
def test_the_engine_gives_the_known_numbers(variant, known) -> None:
    W0, experts = small_case()
    residual = RESIDUALS["sum"][0]
    result = run({NAME: W0}, [{NAME: W} for W in experts], variant=variant, residual=residual)
    out = result.tensors[NAME].numpy()
    assert np.linalg.norm(out) == pytest.approx(known["out_norm"], abs=1e-13)
    np.testing.assert_allclose(out[0, :3], known["out"], atol=1e-13)
    assert np.linalg.norm(out - W0) == pytest.approx(known["moved"], abs=1e-13)
    facts = result.details[NAME]["facts"]
    assert facts["merged_norm"] == pytest.approx(known["merged_norm"], abs=1e-13)
    assert facts["correction"] == pytest.approx([known["c"]], abs=1e-11)
    moved = np.linalg.norm(W0 @ decouple(W0, experts, variant)["R_m"] - W0) / np.linalg.norm(W0)
    assert facts["moved"] == pytest.approx(moved, abs=1e-13)


def split_with(mode, variant, W0, experts):
    """Each model's rotation and residual, as the library finds them."""
    from orthomerge.merging.registry import get_method
    from orthomerge.merging.steps.decoupling import Settings
    from orthomerge.merging.steps.decoupling import decouple as split

    defaults = {k: p.default for k, p in get_method("orthomerge-decoupled").parameters.items()}
    chosen = {**defaults, "mode": mode, "variant": variant, "gate": "off"}
    deltas = [torch.tensor(W - W0) for W in experts]
    return split(torch.tensor(W0), deltas, Settings.of(chosen, len(experts)), "linear")


@pytest.mark.parametrize("residual", ["ties", "tsv"])
def test_the_engine_gives_the_known_residual_merges(residual) -> None:
    W0, experts = small_case()
    ours, theirs = RESIDUALS[residual]
    ours = {**ours, "density": same_count(96)} if residual == "ties" else ours
    found = decouple(W0, experts, "global")
    wanted = found["rotated"] + theirs([{NAME: r} for r in found["residuals"]])[NAME]
    result = run({NAME: W0}, [{NAME: W} for W in experts], residual=ours)
    np.testing.assert_allclose(result.tensors[NAME], wanted, atol=1e-13)
    known = {"ties": (9.916292834734596, 1e-13), "tsv": (9.889764780, 1e-5)}[residual]
    assert float(result.tensors[NAME].norm()) == pytest.approx(known[0], abs=known[1])


@pytest.mark.parametrize(("variant", "known"), KNOWN, ids=VARIANTS)
def test_the_split_gives_the_known_numbers(variant, known) -> None:
    W0, experts = small_case()
    found = split_with("reproduce", variant, W0, experts)
    norms = [0.0 if fit is None else float(fit.generator().norm()) for fit in found.fits]
    np.testing.assert_allclose(norms, known["norms"], atol=1e-14)
    sizes = [float(r.norm()) for r in found.residuals]
    np.testing.assert_allclose(sizes, known["residuals"], atol=1e-14)
    if variant == "conflict-aware":
        assert [facts["conflict_rows"] for facts in found.facts] == [0, 1, 1]


def model(seed: int, wide: bool) -> tuple[dict, list[dict]]:
    """A base and three fine-tunes of every kind of tensor, updates of different sizes."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embed_tokens.weight": (20, 8),
        "layers.0.q_proj.weight": (8, 8),
        "layers.0.up_proj.weight": (14, 8),
        "layers.0.input_layernorm.weight": (8,),
        "layers.0.up_proj.bias": (14,),
        "vision.conv.weight": (4, 2, 3, 3),
        "lm_head.weight": (20, 8),
    }
    if wide:
        shapes["layers.0.down_proj.weight"] = (8, 14)
    base = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def tuned(size):
        return {n: W + size * rng.standard_normal(W.shape) for n, W in base.items()}

    return base, [tuned(size) for size in (0.05, 0.03, 0.08)]


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_models_equal_the_reference(variant, residual) -> None:
    ours, theirs = RESIDUALS[residual]
    base, experts = model(0, wide=False)
    if residual == "ties":
        ours = {**ours, "density": same_count(sum(W.size for W in base.values()))}
    if residual == "tsv":  # the reference leaves kernels to the mean; ours sees matrices
        base.pop("vision.conv.weight")
        experts = [{n: W for n, W in e.items() if n in base} for e in experts]
    wanted = merge_models(base, experts, variant, theirs)
    result = run(base, experts, variant=variant, residual=ours)
    for name, value in result.tensors.items():
        np.testing.assert_allclose(value, wanted["tensors"][name], atol=1e-12, err_msg=name)
        facts = result.details[name]["facts"]
        assert ("correction" in facts) == is_rotated(name, base[name])
        if name in wanted["layers"]:
            layer = wanted["layers"][name]
            assert facts["correction"] == pytest.approx([layer["c"]], rel=1e-9)
            size = np.linalg.norm(layer["merged"])
            assert facts["merged_norm"] == pytest.approx(size, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wide_layers_agree_in_what_the_weights_determine(variant) -> None:
    """W_0 R_i is unique where o < n although R_i is not: so are the residuals."""
    base, experts = model(1, wide=True)
    W0 = base["layers.0.down_proj.weight"]
    Ws = [e["layers.0.down_proj.weight"] for e in experts]
    found = split_with("reproduce", variant, W0, Ws)
    for at, (W, X) in enumerate(zip(Ws, targets(W0, Ws, variant), strict=True)):
        if (X == W0).all():
            assert found.fits[at] is None
            continue
        turned = W0 @ procrustes(W0, X)
        np.testing.assert_allclose(found.residuals[at], W - turned, atol=1e-12)
        fraction = np.linalg.norm(X - turned) / np.linalg.norm(X - W0)
        assert found.facts[at]["residual_fraction"] == pytest.approx(fraction, rel=1e-10)
        anchored = split_with("faithful", variant, W0, Ws)
        np.testing.assert_allclose(anchored.residuals[at], W - turned, atol=1e-4)


def geometric(o: int, n: int, kappa: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((o, min(o, n))))[0]
    V = np.linalg.qr(rng.standard_normal((n, min(o, n))))[0]
    return (U * np.geomspace(1, 1 / kappa, min(o, n))) @ V.T


def test_wide_layers_are_not_moved_by_their_null_space() -> None:
    """The reference's arbitrary null space moves the base by a fifth; updates of 2 % must not."""
    W0 = geometric(64, 192, 20, 1)
    experts = []
    for seed in range(10, 15):
        D = np.random.default_rng(seed).standard_normal(W0.shape)
        experts.append(W0 + 0.02 * np.linalg.norm(W0) / np.linalg.norm(D) * D)
    settings = {"residual": {"method": "task-arithmetic", "scale": 0.2}}
    models = ({NAME: W0}, [{NAME: W} for W in experts])
    anchored = run(*models, **settings, mode="faithful").details[NAME]["facts"]
    assert anchored["moved"] == pytest.approx(0.0183, abs=5e-4)
    assert anchored["merged_norm"] == pytest.approx(0.323, abs=0.01)
    assert 2.0 < anchored["correction"][0] < np.sqrt(5)
    norms = [np.linalg.norm(inverse_cayley(procrustes(W0, W))) for W in experts]
    assert min(norms) > 10  # the reference's generators are nothing but null space
