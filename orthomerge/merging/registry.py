"""The catalogue of merge methods: ``@merge_method`` turns one pure function into one entry.

Everything the rest of the program knows of a method (recipe schema, ``--set``, ``methods show``,
the docs table) is read from the entry, which is read from the function's signature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from orthomerge.catalogue import find_entry, import_entries
from orthomerge.merging.spaces import Space
from orthomerge.parameters import Parameter, declared_parameters

__all__ = ["LAWS", "MergeMethod", "Merged", "all_methods", "get_method", "merge_method"]

_ENTRY_POINTS = "orthomerge.merge_methods"
_SUPPLIED = {"weights", "survey", "role", "draws", "folded"}
_ALIASES: dict[str, str] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])
_REGISTRY: dict[str, MergeMethod] = {}

#: Laws a method can declare; tests/laws checks each declared one for each method.
LAWS: dict[str, str] = {
    "identity": "one model at weight 1 gives that model",
    "idempotent": "identical models give that model",
    "permutation": "the order of the models does not matter",
    "scale-equivariance": "scaling all inputs scales the output",
    "additive": "the update W - W_0 does not depend on the base, whatever the parameters",
}


@dataclass(frozen=True, slots=True)
class Merged:
    """What a method made of one tensor.

    Args:
        tensor: The merged tensor; ``Factors`` in FACTORS space.
        facts: What it measured on the way, JSON-ready; kept in the journal and the report. Of a
            batch of modules each fact is a tensor with one entry per module.
        norm: Frobenius norm of a product of factors [...] in float64, where the method knows it.
    """

    tensor: Any
    facts: Mapping[str, Any] = field(default_factory=dict)
    norm: Any = None


@dataclass(frozen=True)
class MergeMethod:
    """One merge method as the planner and the engine see it.

    Args:
        name: Stable kebab-case id.
        function: ``(contributions, *, ...)`` in WEIGHT, ROTATION and FACTORS space,
            ``(base, deltas, *, ...)`` in DELTA space.
        space: What it works on.
        reference: Paper or origin.
        survey: ``survey(streams, *, weights, **parameters)``, called once per tensor, or once for
            the whole model if the method has a parameter ``scope`` that is set to ``"model"``. In
            ROTATION space ``survey(norms, **parameters)``, once; ``norms()`` measures each model's
            ‖A_i‖. Its result is passed to the function as ``survey``.
        min_models: Fewest models it takes.
        max_models: Most models it takes, or None.
        laws: Names from ``LAWS`` that hold at default parameters.
        negative_weights: Whether a weight may be below zero.
        divides_by_weight_sum: Whether weights that sum to zero are an error: always (True), never
            (False), or when the boolean parameter of this name is set.
        parameters: What can be set.
        whole: Whether it needs whole tensors in their shapes, not flat pieces.
        workspace: For a whole-tensor method: elements of the compute dtype it holds beside its
            inputs, from the tensor's shape and the number of models. Default: as many again.
        residual: For a method with a nested one: ``(base, deltas, model, *, role, **parameters)``
            gives what is left of one model's delta for the nested method.
        dense: Id of the method that takes its place for sources it cannot read.
        resolved: ``(parameters, models)`` gives the parameters with everything decided that was
            left to the method, for the provenance.
        unfit: ``(shape, role, parameters)`` says why a whole tensor cannot be merged, or None.
        factors: The same method on low-rank factors, exact without forming the matrix:
            ``(factors, *, weights, **parameters)`` gives ``Factors``; for a method of FACTORS space
            its function itself.
        batched: Whether ``factors`` also takes batches of modules of one shape.
        output_rank: Largest rank of the result, from the ranks of the factors; default: their sum.
        unfit_ranks: ``(ranks)`` says why factors of these ranks cannot be merged, or None.
        lift: For a method of FACTORS space that runs its nested one in coordinates: their name,
            see ``lifting.coordinates``, from its parameters.
        whole_changes: Whether a method of factors needs them to be the whole change of the weight,
            which DoRA's are not: magnitudes scale the base's rows beside them.
        caution: What its user should know before it runs; a note of every plan.
        aliases: Other names it is known by.
    """

    name: str
    function: Callable[..., Any]
    space: Space
    reference: str
    survey: Callable[..., Any] | None = None
    min_models: int = 1
    max_models: int | None = None
    laws: frozenset[str] = frozenset()
    negative_weights: bool = True
    divides_by_weight_sum: bool | str = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    whole: bool = False
    workspace: Callable[[tuple[int, ...], int], int] | None = None
    residual: Callable[..., Any] | None = None
    dense: str | None = None
    unfit: Callable[[tuple[int, ...], str, Mapping[str, Any]], str | None] | None = None
    resolved: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None
    factors: Callable[..., Any] | None = None
    batched: bool = False
    output_rank: Callable[[Sequence[int]], int] = sum
    unfit_ranks: Callable[[Sequence[int]], str | None] | None = None
    lift: Callable[[Mapping[str, Any]], Any] | None = None
    whole_changes: bool = False
    caution: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def nests(self) -> bool:
        """Whether one of its parameters names another method."""
        return any(parameter.kind is dict for parameter in self.parameters.values())

    @property
    def needs_base(self) -> bool:
        """Whether a base model must be given."""
        return self.space is Space.DELTA

    @property
    def merges_factors(self) -> bool:
        """Whether it can merge low-rank changes without their base: itself, or in coordinates."""
        lifted = self.space is Space.DELTA and "additive" in self.laws
        return self.factors is not None or lifted

    @property
    def uses_weights(self) -> bool:
        """Whether it takes one weight per model."""
        return "weights" in self._arguments

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers, or runs a method that may."""
        return "draws" in self._arguments

    def call(self, *tensors: Any, **arguments: Any) -> Merged:
        """Call the function with those of weights, survey, role and draws that it takes.

        Raises:
            TypeError: It draws random numbers and got none.
        """
        if self._must_draw and arguments.get("draws") is None:
            raise TypeError(f"{self.name} draws random numbers: pass draws=Draws(...)")
        return _call(self.function, self._arguments, tensors, arguments)

    def call_on_factors(self, factors: Any, **arguments: Any) -> Merged:
        """Call the face for low-rank factors with those of the supplied arguments it takes."""
        assert self.factors is not None
        taken = frozenset(inspect.signature(self.factors).parameters)
        return _call(self.factors, taken, (factors,), arguments)

    @functools.cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(self._signature)

    @functools.cached_property
    def _signature(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def _must_draw(self) -> bool:
        return self.is_random and self._signature["draws"].default is inspect.Parameter.empty

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


def _call(
    function: Callable[..., Any], taken: frozenset[str], tensors: Any, arguments: Mapping[str, Any]
) -> Merged:
    given = {k: v for k, v in arguments.items() if k not in _SUPPLIED or k in taken}
    result = function(*tensors, **given)
    return result if isinstance(result, Merged) else Merged(result)


def merge_method(
    name: str, *, space: Space, reference: str, laws: tuple[str, ...] = (), **options: Any
) -> Callable[[_Function], _Function]:
    """Register a pure function as a merge method.

    The function gets fp32 (or fp64) tensors and returns a new one (or ``Merged``), without changing
    its inputs. In WEIGHT and DELTA space it is called on pieces of a tensor, so entry j of its
    result may depend only on entry j of its inputs and on what ``survey`` found; with ``whole`` it
    is called once per tensor, with all of it in its shape and, if it asks, with ``role``: what the
    tensor is in the model. In ROTATION and FACTORS space it is called once per module, in FACTORS
    space with ``batched`` also once for several modules of one shape, with a leading axis. A method
    that asks for ``draws`` gets ``Draws``: random numbers that depend on the entry, not on the
    piece it is in. One of FACTORS space that asks for ``folded`` gets what each B_i was multiplied
    by, beyond A_i, compared with the stored factors; not with ``batched``.

    Args:
        name: Stable kebab-case id.
        space: What it works on.
        reference: Paper or origin.
        laws: Names from ``LAWS`` that hold at default parameters.
        **options: Any other field of ``MergeMethod``, which documents them.
    """
    unknown = set(laws) - set(LAWS)
    if unknown:
        raise ValueError(f"unknown laws {sorted(unknown)}; known: {sorted(LAWS)}")

    def register(function: _Function) -> _Function:
        if name in _REGISTRY and _REGISTRY[name].function is not function:
            raise ValueError(f"two merge methods are called '{name}'")
        if space is Space.FACTORS:
            options["factors"] = function
        parameters = declared_parameters(function, _SUPPLIED)
        method = MergeMethod(
            name, function, space, reference,
            laws=frozenset(laws), parameters=parameters, **options,
        )  # fmt: skip
        _REGISTRY[name] = method
        _ALIASES.update(dict.fromkeys(method.aliases, name))
        return function

    return register


@functools.cache
def _load_all() -> None:
    """Import every built-in method and every installed plug-in, once."""
    import_entries("orthomerge.merging.methods", _ENTRY_POINTS)


def all_methods() -> dict[str, MergeMethod]:
    """Return every registered method by name, sorted."""
    _load_all()
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> MergeMethod:
    """Return one method by its id or another name it is known by.

    Raises:
        UnknownNameError: With the nearest name.
    """
    return find_entry("method", name, all_methods(), _ALIASES)
