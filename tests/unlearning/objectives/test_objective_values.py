"""Every objective's value against loops over tokens in numpy, and against recorded constants.

The constants were computed elsewhere, from published code where it follows its formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from orthomerge.unlearning.objectives import get_objective, sequence_losses
from orthomerge.unlearning.objectives.distances import hidden_distance, kl_from_reference

B, T, V = 2, 5, 4
_PLACES = np.meshgrid(np.arange(B), np.arange(T), np.arange(V), indexing="ij")
Z = 2 * np.sin(1 + 3 * _PLACES[0] + 5 * _PLACES[1] + 7 * _PLACES[2])
Z_REF = 2 * np.cos(2 + 2 * _PLACES[0] + 3 * _PLACES[1] + 5 * _PLACES[2])
IDS = np.array([[0, 1, 2, 3, 1], [3, 2, 1, 0, 2]])
IDK = np.array([[0, 1, 3, 3, 0], [3, 2, 1, 1, 1]])
PROMPTS = (2, 3)


def labels_of(ids: np.ndarray) -> torch.Tensor:
    labels = torch.tensor(ids)
    for row, prompt in enumerate(PROMPTS):
        labels[row, :prompt] = -100
    return labels


LABELS, ALTERNATES = labels_of(IDS), labels_of(IDK)


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def answers(ids: np.ndarray, z: np.ndarray) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Yield, for each row, the logits that score each answer token, and the token."""
    for row, prompt in enumerate(PROMPTS):
        yield [(z[row, t - 1], int(ids[row, t])) for t in range(prompt, T)]


def log_p(z: np.ndarray) -> np.ndarray:
    return z - math.log(sum(math.exp(v) for v in z))


def score(ids: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.array([sum(-log_p(logits)[y] for logits, y in row) for row in answers(ids, z)])


def over_tokens(function: Callable[[np.ndarray, int], float]) -> float:
    values = [function(logits, y) for row in answers(IDS, Z) for logits, y in row]
    return sum(values) / len(values)


def over_rows(values: np.ndarray) -> float:
    return float(sum(values)) / len(values)


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


S, S_REF = score(IDS, Z), score(IDS, Z_REF)
S_IDK, S_IDK_REF = score(IDK, Z), score(IDK, Z_REF)
N = np.array([3, 2])


def npo(beta: float) -> float:
    return over_rows(-2 / beta * log_sigmoid(beta * (S - S_REF)))


def simnpo(beta: float, delta: float) -> float:
    return over_rows(-2 / beta * log_sigmoid(beta * (S / N - delta)))


def dpo(beta: float) -> float:
    ratios = (S_IDK_REF - S_IDK) - (S_REF - S)
    return over_rows(-2 / beta * log_sigmoid(beta * ratios))


def weighted(power: Callable[[float], float]) -> float:
    return -over_tokens(lambda z, y: power(math.exp(log_p(z)[y])) * -log_p(z)[y])


def ceu(skip: int) -> float:
    values = []
    for row in answers(IDS, Z):
        for logits, y in row[skip:]:
            others = [v for v in range(V) if v != y]
            total = sum(math.exp(logits[v]) for v in others)
            goal = {v: math.exp(logits[v]) / total for v in others}
            values.append(-sum(goal[v] * log_p(logits)[v] for v in others))
    return sum(values) / len(values)


def undial(beta: float, *, everywhere: bool) -> float:
    values = []
    for row, prompt in enumerate(PROMPTS):
        for t in range(1 if everywhere else prompt, T):
            goal = Z_REF[row, t - 1].copy()
            goal[IDS[row, t]] -= beta if t >= prompt else 0
            values.append(-np.exp(log_p(goal)) @ log_p(Z[row, t - 1]))
    return float(np.mean(values))


def pdu(shift: int) -> float:
    places = [(row, t - shift) for row, prompt in enumerate(PROMPTS) for t in range(prompt, T)]
    return float(np.mean([(Z[p].max() - Z[p].mean()) ** 2 for p in places]))


def kl(*, everywhere: bool) -> float:
    values = []
    for row, prompt in enumerate(PROMPTS):
        for t in range(0 if everywhere else prompt - 1, T if everywhere else T - 1):
            p, q = log_p(Z_REF[row, t]), log_p(Z[row, t])
            values.append(float(np.exp(p) @ (p - q)))
    return sum(values) / len(values)


def rmu(goal: float, *, crossed: bool) -> float:
    squares = ((Z - goal) ** 2).mean(-1)
    sums = [squares[row, prompt:].sum() for row, prompt in enumerate(PROMPTS)]
    counts = [T - prompt for prompt in PROMPTS]
    if crossed:
        return float(np.mean([total / count for total in sums for count in counts]))
    return float(np.mean([total / count for total, count in zip(sums, counts, strict=True)]))


def value(name: str, **settings: object) -> float:
    info = get_objective(name)
    inputs = {
        "logits": tensor(Z), "labels": LABELS, "reference_logits": tensor(Z_REF),
        "reference_scores": tensor(S_REF), "alternate_logits": tensor(Z),
        "alternate_labels": ALTERNATES, "alternate_reference_scores": tensor(S_IDK_REF),
        "hidden": tensor(Z), "direction": torch.ones(V, dtype=torch.float64),
    }  # fmt: skip
    return float(info.function(*(inputs[argument] for argument in info.arguments), **settings))


CASES = {
    "ga": (value("ga"), -over_tokens(lambda z, y: -log_p(z)[y]), -0.93674246),
    "grad-diff": (value("grad-diff"), -over_tokens(lambda z, y: -log_p(z)[y]), -0.93674246),
    "npo .1": (value("npo", beta=0.1), npo(0.1), 21.22245722),
    "npo 1": (value("npo", beta=1.0), npo(1.0), 12.72040559),
    "dpo .1": (value("dpo", beta=0.1), dpo(0.1), 17.30897744),
    "simnpo": (value("simnpo", beta=4.5), simnpo(4.5, 0), 0.00830052),
    "simnpo margin": (value("simnpo", beta=2.5, margin=1.25), simnpo(2.5, 0.5), 0.25074338),
    "simnpo compat": (
        value("simnpo", beta=2.5, margin=0.5, compat=True), simnpo(2.5, 0.5), 0.25074338
    ),
    "wga 1": (value("wga", beta=1.0), weighted(lambda p: p), -0.32079154),
    "wga .5": (value("wga", beta=0.5), weighted(lambda p: p**0.5), -0.53083574),
    "satimp": (value("satimp"), weighted(lambda p: p**5 * (1 - p)), -0.00796556),
    "ceu 0": (value("ceu", skip=0), ceu(0), 1.49305470),
    "ceu 1": (value("ceu"), ceu(1), 1.59661749),
    "undial": (value("undial"), undial(10, everywhere=False), 2.21230572),
    "undial compat": (value("undial", compat=True), undial(10, everywhere=True), 1.80095376),
    "pdu": (value("pdu"), pdu(1), 1.27362427),
    "pdu compat": (value("pdu", compat=True), pdu(0), 2.12404150),
    "rmu": (value("rmu", steering=3.25), rmu(3.25, crossed=False), 12.85034429),
    "rmu compat": (
        value("rmu", steering=3.25, compat=True), rmu(3.25, crossed=True), 14.29521827
    ),
    "kl": (
        float(kl_from_reference(tensor(Z), LABELS, tensor(Z_REF))),
        kl(everywhere=False),
        1.29536934,
    ),
    "kl compat": (
        float(kl_from_reference(tensor(Z), LABELS, tensor(Z_REF), compat=True)),
        kl(everywhere=True),
        0.80730978,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("found", "by_hand", "recorded"), CASES.values(), ids=list(CASES))
def test_value(found: float, by_hand: float, recorded: float) -> None:
    assert found == pytest.approx(by_hand, rel=1e-12)
    assert found == pytest.approx(recorded, abs=6e-9)


def test_sequence_losses() -> None:
    for z, by_hand, recorded in (
        (Z, S, [3.09762213, 1.58609017]),
        (Z_REF, S_REF, [10.02141536, 7.37867348]),
    ):
        scores, counts = sequence_losses(tensor(z), LABELS)
        assert scores.numpy() == pytest.approx(by_hand, rel=1e-12)
        assert scores.numpy() == pytest.approx(recorded, abs=6e-9)
        assert counts.tolist() == [3, 2]


def test_idk_is_the_mean_loss_of_the_other_answers() -> None:
    assert value("idk") == pytest.approx(S_IDK.sum() / N.sum(), rel=1e-12)


def test_weighted_ascent_without_weights_is_ascent() -> None:
    assert value("wga", beta=0.0) == value("ga")
    assert value("satimp", beta1=0.0, beta2=0.0) == value("ga")


def test_npo_with_a_small_beta_pulls_as_ascent_on_whole_answers() -> None:
    z = tensor(Z).requires_grad_()
    npo_function = get_objective("npo").function
    (grad,) = torch.autograd.grad(npo_function(z, LABELS, tensor(S_REF), beta=1e-9), z)
    (ascent,) = torch.autograd.grad(-sequence_losses(z, LABELS)[0].mean(), z)
    torch.testing.assert_close(grad, ascent, rtol=1e-6, atol=1e-12)


def test_published_undial_lowers_a_token_that_was_never_there() -> None:
    """With V ≥ 100 the label -100 indexes the token V - 100 of every unscored position."""
    torch.manual_seed(0)
    z, z_ref = torch.randn(1, 3, 103).double(), torch.randn(1, 3, 103).double()
    labels = torch.tensor([[-100, -100, 7]])
    goal = z_ref[0, :2].clone()
    goal[0, 3] -= 10
    goal[1, 7] -= 10
    by_hand = -(goal.softmax(-1) * z[0, :2].log_softmax(-1)).sum(-1).mean()
    found = get_objective("undial").function(z, labels, z_ref, compat=True)
    torch.testing.assert_close(found, by_hand)


def test_hidden_distance_to_states_of_every_token() -> None:
    found = hidden_distance(tensor(Z), tensor(Z_REF), LABELS)
    squares = ((Z - Z_REF) ** 2).mean(-1)
    by_hand = np.mean([squares[row, prompt:].mean() for row, prompt in enumerate(PROMPTS)])
    assert float(found) == pytest.approx(float(by_hand), rel=1e-12)


RAISING = ("ga", "grad-diff", "npo", "simnpo", "dpo", "wga", "satimp")


@pytest.mark.parametrize("name", RAISING)
def test_one_step_makes_every_forget_row_less_likely(name: str) -> None:
    z = tensor(Z).requires_grad_()
    info = get_objective(name)
    inputs = {
        "logits": z, "labels": LABELS, "reference_scores": tensor(S_REF),
        "alternate_logits": tensor(Z), "alternate_labels": ALTERNATES,
        "alternate_reference_scores": tensor(S_IDK_REF),
    }  # fmt: skip
    loss = info.function(*(inputs[argument] for argument in info.arguments))
    (grad,) = torch.autograd.grad(loss, z)
    after, _ = sequence_losses(z.detach() - 0.01 * grad, LABELS)
    assert bool((after > tensor(S)).all())


@pytest.mark.parametrize("name", ["ceu", "undial", "rmu", "pdu", "idk"])
def test_one_step_lowers_the_losses_that_have_a_goal(name: str) -> None:
    z = tensor(Z).requires_grad_()
    info = get_objective(name)
    inputs = {
        "logits": z, "labels": LABELS, "reference_logits": tensor(Z_REF), "hidden": z,
        "direction": torch.ones(V).double(), "alternate_logits": z, "alternate_labels": ALTERNATES,
    }  # fmt: skip
    before = info.function(*(inputs[argument] for argument in info.arguments))
    (grad,) = torch.autograd.grad(before, z)
    stepped = z.detach() - 0.01 * grad
    later = inputs | dict.fromkeys(("logits", "hidden", "alternate_logits"), stepped)
    after = info.function(*(later[argument] for argument in info.arguments))
    assert after.item() < before.item()
