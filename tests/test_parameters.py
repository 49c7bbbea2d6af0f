"""Parameters from signatures: what they allow, what they convert, what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest

from orthomerge.errors import RecipeError
from orthomerge.parameters import Between, OwnKind, Parameter, declared_parameters


class Words(OwnKind):
    def parameter(self, name: str, default: Any, help: str, optional: bool) -> Parameter:
        assert optional
        return Parameter(name, str, default, choices=("one", "two"), help=help)


def example(
    tensors: Sequence[object],
    *,
    weights: Sequence[float],
    rate: Annotated[float, Between(0, 1)] = 0.5,
    rounds: int = 3,
    mode: Literal["fast", "exact"] = "fast",
    on: bool = True,
    scale: Annotated[float | Literal["auto", "off"] | None, Between(0)] = "auto",
    special: Annotated[list[str] | None, Words()] = "one",
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
        special: Which.
    """


PARAMETERS = declared_parameters(example, {"weights"})


def test_parameters_come_from_the_signature() -> None:
    assert list(PARAMETERS) == ["rate", "rounds", "mode", "on", "scale", "special"]
    assert [p.default for p in PARAMETERS.values()] == [0.5, 3, "fast", True, "auto", "one"]
    assert PARAMETERS["rate"].help == "How much, in two lines."
    assert PARAMETERS["rate"].allowed == "number in [0, 1]"
    assert PARAMETERS["mode"].allowed == "fast | exact"
    assert PARAMETERS["scale"].allowed == "number ≥ 0 | auto | off | null"


def test_a_mark_makes_its_own_parameter() -> None:
    assert PARAMETERS["special"].allowed == "one | two"
    assert PARAMETERS["special"].help == "Which."


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


def test_a_parameter_needs_a_plain_type_and_a_default() -> None:
    def wrong(tensors: object, *, size: list[int]) -> None: ...

    with pytest.raises(TypeError, match="size"):
        declared_parameters(wrong, set())
