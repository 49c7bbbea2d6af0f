"""The catalogue of merge methods: ``@merge_method`` turns one pure function into one entry.

Everything the rest of the program knows of a method (recipe schema, ``--set``, ``methods show``,
the docs table) is read from the entry, which is read from the function's signature.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from orthomerge.errors import UnknownNameError
from orthomerge.merging.parameters import Parameter, declared_parameters
from orthomerge.merging.spaces import Space

__all__ = ["LAWS", "MergeMethod", "all_methods", "get_method", "merge_method"]

_ENTRY_POINTS = "orthomerge.merge_methods"
_SUPPLIED = {"weights", "survey"}
_Function = TypeVar("_Function", bound=Callable[..., Any])
_REGISTRY: dict[str, MergeMethod] = {}

#: Laws a method can declare; tests/laws checks each declared one for each method.
LAWS: dict[str, str] = {
    "identity": "one model at weight 1 gives that model",
    "idempotent": "identical models give that model",
    "permutation": "the order of the models does not matter",
    "scale-equivariance": "scaling all inputs scales the output",
}


@dataclass(frozen=True)
class MergeMethod:
    """One merge method as the planner and the engine see it.

    Args:
        name: Stable kebab-case id.
        function: ``(contributions, *, ...)`` in WEIGHT and ROTATION space,
            ``(base, deltas, *, ...)`` in DELTA space.
        space: What it works on.
        reference: Paper or origin.
        survey: Computes per-tensor or whole-model statistics from streams, before ``function``.
        min_models: Fewest models it takes.
        max_models: Most models it takes, or None.
        laws: Names from ``LAWS`` that hold at default parameters.
        negative_weights: Whether a weight may be below zero.
        divides_by_weight_sum: Whether weights must not sum to zero, or the parameter that says so.
        parameters: What can be set.
    """

    name: str
    function: Callable[..., Any]
    space: Space
    reference: str
    survey: Callable[..., Any] | None
    min_models: int
    max_models: int | None
    laws: frozenset[str]
    negative_weights: bool
    divides_by_weight_sum: bool | str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def needs_base(self) -> bool:
        """Whether a base model must be given."""
        return self.space is Space.DELTA

    @property
    def uses_weights(self) -> bool:
        """Whether it takes one weight per model."""
        return "weights" in inspect.signature(self.function).parameters

    def needs_weight_sum(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether weights that sum to zero are an error at these parameters."""
        if isinstance(self.divides_by_weight_sum, str):
            return bool(parameters[self.divides_by_weight_sum])
        return self.divides_by_weight_sum

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def description(self) -> str:
        """Its whole docstring."""
        return inspect.getdoc(self.function) or ""


def merge_method(
    name: str,
    *,
    space: Space,
    reference: str,
    survey: Callable[..., Any] | None = None,
    min_models: int = 1,
    max_models: int | None = None,
    laws: tuple[str, ...] = (),
    negative_weights: bool = True,
    divides_by_weight_sum: bool | str = False,
) -> Callable[[_Function], _Function]:
    """Register a pure function as a merge method.

    The function gets fp32 (or fp64) tensors and returns a new one, without changing its inputs. In
    WEIGHT and DELTA space it is called on pieces of a tensor, so entry j of its result may depend
    only on entry j of its inputs and on what ``survey`` found; in ROTATION space it is called once
    per module.

    Args:
        name: Stable kebab-case id used in recipes.
        space: What the function works on.
        reference: Paper (arXiv id) or origin of the formula.
        survey: ``survey(streams, *, weights, **parameters)``, called once per tensor, or once for
            the whole model if the method has a parameter ``scope`` that is set to ``"model"``. Its
            result is passed to the function as ``survey``.
        min_models: Fewest models it takes.
        max_models: Most models it takes.
        laws: Names from ``LAWS`` that hold at default parameters.
        negative_weights: Whether a weight may be below zero.
        divides_by_weight_sum: Whether weights that sum to zero are an error: always (True), never
            (False), or when the boolean parameter of this name is set.
    """
    unknown = set(laws) - set(LAWS)
    if unknown:
        raise ValueError(f"unknown laws {sorted(unknown)}; known: {sorted(LAWS)}")

    def register(function: _Function) -> _Function:
        if name in _REGISTRY and _REGISTRY[name].function is not function:
            raise ValueError(f"two merge methods are called '{name}'")
        _REGISTRY[name] = MergeMethod(
            name,
            function,
            space,
            reference,
            survey,
            min_models,
            max_models,
            frozenset(laws),
            negative_weights,
            divides_by_weight_sum,
            declared_parameters(function, _SUPPLIED),
        )
        return function

    return register


@functools.cache
def _load_all() -> None:
    """Import every built-in method and every installed plug-in, once."""
    package = importlib.import_module("orthomerge.merging.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry_point in entry_points(group=_ENTRY_POINTS):
        entry_point.load()


def all_methods() -> dict[str, MergeMethod]:
    """Return every registered method by name, sorted."""
    _load_all()
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> MergeMethod:
    """Return one method.

    Raises:
        UnknownNameError: With the nearest name.
    """
    methods = all_methods()
    if name not in methods:
        raise UnknownNameError("method", name, methods)
    return methods[name]
