"""Registration: parameters from signatures, unknown names, third-party methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import pytest

from orthomerge.errors import RecipeError, UnknownNameError
from orthomerge.merging import registry
from orthomerge.merging.parameters import Between, declared_parameters
from orthomerge.merging.registry import get_method, merge_method
from orthomerge.merging.spaces import Space


def example(
    tensors: Sequence[object],
    *,
    weights: Sequence[float],
    rate: Annotated[float, Between(0, 1)] = 0.5,
    rounds: int = 3,
    mode: Literal["fast", "exact"] = "fast",
    on: bool = True,
    scale: Annotated[float | Literal["auto", "off"] | None, Between(0)] = "auto",
) -> object:
    """Do something.

    Args:
        tensors: Inputs.
        weights: Weights.
        rate: How much,
            in two lines.
        rounds: How often.
        mode: Which way.
        on: Whether.
        scale: How strongly.
    """


PARAMETERS = declared_parameters(example, {"weights"})


def test_parameters_come_from_the_signature() -> None:
    assert list(PARAMETERS) == ["rate", "rounds", "mode", "on", "scale"]
    assert [p.default for p in PARAMETERS.values()] == [0.5, 3, "fast", True, "auto"]
    assert PARAMETERS["rate"].help == "How much, in two lines."
    assert PARAMETERS["rate"].allowed == "number in [0, 1]"
    assert PARAMETERS["mode"].allowed == "fast | exact"
    assert PARAMETERS["scale"].allowed == "number ≥ 0 | auto | off | null"


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("rate", 1, 1.0),
        ("rounds", 2.0, 2),
        ("mode", "exact", "exact"),
        ("on", False, False),
        ("scale", 2, 2.0),
        ("scale", "auto", "auto"),
        ("scale", False, "off"),  # as YAML reads a bare off
        ("scale", None, None),
    ],
)
def test_good_values_are_converted(name, given, wanted) -> None:
    found = PARAMETERS[name].check(given)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rate", 1.01),
        ("rate", "0.5"),
        ("rate", True),
        ("rate", float("nan")),
        ("rate", None),
        ("rounds", 2.5),
        ("mode", "slow"),
        ("on", 1),
        ("scale", -1.0),
        ("scale", "automatic"),
        ("scale", True),
        ("scale", "1"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(name, given) -> None:
    with pytest.raises(RecipeError) as caught:
        PARAMETERS[name].check(given)
    assert name in str(caught.value)
    assert PARAMETERS[name].allowed in str(caught.value)


def test_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ties'"):
        get_method("tise")


def test_a_parameter_needs_a_plain_type_and_a_default() -> None:
    def wrong(tensors: object, *, size: list[int]) -> None: ...

    with pytest.raises(TypeError, match="size"):
        declared_parameters(wrong, set())


@pytest.fixture
def clean_registry(monkeypatch):
    registry.all_methods()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.mark.usefixtures("clean_registry")
def test_two_methods_cannot_share_a_name() -> None:
    with pytest.raises(ValueError, match="linear"):
        merge_method("linear", space=Space.WEIGHT, reference="none")(example)


@pytest.mark.usefixtures("clean_registry")
def test_an_undeclared_law_is_refused() -> None:
    with pytest.raises(ValueError, match="gravity"):
        merge_method("x", space=Space.WEIGHT, reference="none", laws=("gravity",))


@pytest.mark.usefixtures("clean_registry")
def test_a_third_party_method_merges_through_the_engine() -> None:
    import torch

    from orthomerge import merge

    @merge_method("largest", space=Space.WEIGHT, reference="test")
    def largest(tensors: Sequence[torch.Tensor], *, offset: float = 0.0) -> torch.Tensor:
        """Take the largest entry.

        Args:
            tensors: Inputs.
            offset: Added.
        """
        return torch.stack(list(tensors)).amax(0) + offset

    a, b = {"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([3.0, 2.0])}
    assert merge([a, b], method="largest", offset=1.0).tensors["w"].tolist() == [4.0, 6.0]


def test_entry_points_are_loaded(monkeypatch) -> None:
    loaded = []

    class EntryPoint:
        def load(self):
            loaded.append(True)

    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint()])
    registry._load_all.__wrapped__()
    assert loaded == [True]
