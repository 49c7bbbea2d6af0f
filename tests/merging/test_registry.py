"""Registration: nested methods, unknown names, third-party methods."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from orthomerge import catalogue
from orthomerge.errors import RecipeError, UnknownNameError
from orthomerge.merging import registry
from orthomerge.merging.parameters import NestedLoraMethod, NestedMethod, NestedParameter
from orthomerge.merging.registry import get_method, merge_method
from orthomerge.merging.spaces import Space
from orthomerge.parameters import declared_parameters


def example(tensors: Sequence[object], *, weights: Sequence[float], rounds: int = 3) -> object:
    """Do something."""


def outer(tensors: object, *, op: NestedMethod = "ties", loras: NestedLoraMethod = None) -> object:
    """Do something.

    Args:
        tensors: Inputs.
        op: Which method.
        loras: Which method of factors.
    """


NESTED = declared_parameters(outer, set())


def test_nested_methods_are_parameters_with_a_space() -> None:
    op, loras = NESTED["op"], NESTED["loras"]
    assert isinstance(op, NestedParameter)
    assert isinstance(loras, NestedParameter)
    assert (op.nested_space, loras.nested_space) == (Space.DELTA, Space.FACTORS)
    assert (op.kind, op.default, op.help) == (dict, "ties", "Which method.")
    assert op.allowed == "a method of task vectors, or {method: name, parameter: value, ...} | null"


def test_a_nested_method_is_filled_in() -> None:
    filled = NESTED["op"].check("ties")
    assert filled == NESTED["op"].check({"method": "ties"})
    assert filled["method"] == "ties"
    assert set(filled) == {"method", *get_method("ties").parameters}
    assert NESTED["op"].check(None) is None


@pytest.mark.parametrize("given", [3, {"density": 0.5}, {"method": 1}, ["ties"]])
def test_what_names_no_method_is_refused(given) -> None:
    with pytest.raises(RecipeError, match="a method of task vectors"):
        NESTED["op"].check(given)


def test_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ties'"):
        get_method("tise")


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

    monkeypatch.setattr(catalogue, "entry_points", lambda group: [EntryPoint()])
    registry._load_all.__wrapped__()
    assert loaded == [True]
