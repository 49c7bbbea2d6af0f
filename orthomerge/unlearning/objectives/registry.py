"""The catalogue of unlearning objectives: ``@objective`` turns one pure function into one entry.

Everything the rest of the program knows of an objective (recipe schema, ``--set``,
``methods show``, the docs table, which tensors it must be given) is read from the entry, which is
read from the function's signature. Listing objectives does not import torch.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from orthomerge.catalogue import find_entry, import_entries
from orthomerge.parameters import Parameter, declared_parameters

if TYPE_CHECKING:
    from orthomerge.unlearning.objectives.bound import Objective

__all__ = [
    "RETAIN_LOSSES",
    "Need",
    "ObjectiveInfo",
    "all_objectives",
    "get_objective",
    "objective",
]

_ENTRY_POINTS = "orthomerge.unlearning_objectives"
_Function = TypeVar("_Function", bound=Callable[..., Any])
_REGISTRY: dict[str, ObjectiveInfo] = {}
_ALIASES: dict[str, str] = {}


class Need(enum.Enum):
    """What an objective must be given beside the model's logits on the forget set."""

    REFERENCE_SCORES = "sequence losses of the starting model"
    REFERENCE_LOGITS = "logits of the starting model"
    REFERENCE_HIDDEN = "hidden states of the starting model"
    ALTERNATES = "another answer to every question"
    HIDDEN = "hidden states"


#: What a function may take as positional arguments, and what must be there for that.
SUPPLIED: dict[str, frozenset[Need]] = {
    "logits": frozenset(),
    "labels": frozenset(),
    "reference_scores": frozenset({Need.REFERENCE_SCORES}),
    "reference_logits": frozenset({Need.REFERENCE_LOGITS}),
    "hidden": frozenset({Need.HIDDEN}),
    "direction": frozenset({Need.HIDDEN}),
    "alternate_logits": frozenset({Need.ALTERNATES}),
    "alternate_labels": frozenset({Need.ALTERNATES}),
    "alternate_reference_scores": frozenset({Need.ALTERNATES, Need.REFERENCE_SCORES}),
}

#: The losses that say what must stay, and what must be there for each.
RETAIN_LOSSES: dict[str, frozenset[Need]] = {
    "nll": frozenset(),
    "kl": frozenset({Need.REFERENCE_LOGITS}),
    "hidden": frozenset({Need.HIDDEN, Need.REFERENCE_HIDDEN}),
    "none": frozenset(),
}

_RESERVED = {"compat"}
_NOT_PARAMETERS = {"retain", "forget_weight", "retain_weight"}


@dataclass(frozen=True)
class ObjectiveInfo:
    """One objective as recipes, the command line and the trainer see it.

    Args:
        name: Stable kebab-case id.
        function: The forget loss; its positional arguments are names from ``SUPPLIED``.
        reference: Paper.
        forget_weight: γ by default.
        retain_weight: α by default.
        retain: The retain loss by default, a name from ``RETAIN_LOSSES``.
        averages: What the forget loss is a mean over.
        skips: The parameter that says how many first tokens of every answer are left out.
        dual: Whether α is a dual variable, moved after every step by its parameters.
        required: Parameters without a sensible default: null is refused.
        aliases: Other names it is known by.
        parameters: What can be set.
    """

    name: str
    function: Callable[..., Any]
    reference: str
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    retain: str = "nll"
    averages: Literal["tokens", "rows"] = "tokens"
    skips: str | None = None
    dual: bool = False
    required: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """The positional arguments of the function."""
        signature = inspect.signature(self.function).parameters.values()
        return tuple(a.name for a in signature if a.kind is not a.KEYWORD_ONLY)

    @functools.cached_property
    def takes_compat(self) -> bool:
        """Whether its published code departs from its formula in a way that can be asked for."""
        return "compat" in inspect.signature(self.function).parameters

    @functools.cached_property
    def needs(self) -> frozenset[Need]:
        """What its forget loss must be given; the retain loss may need more."""
        return frozenset().union(*(SUPPLIED[name] for name in self.arguments))

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return self.description.partition("\n")[0]

    @property
    def description(self) -> str:
        """Its whole docstring."""
        return inspect.getdoc(self.function) or ""

    def bind(
        self,
        *,
        compat: bool = False,
        retain: str | None = None,
        forget_weight: float | None = None,
        retain_weight: float | None = None,
        **parameters: Any,
    ) -> Objective:
        """Return the objective with all its settings decided.

        Args:
            compat: Reproduce what the published code does beside its formula, for comparisons.
            retain: ``nll`` (mean over tokens), ``kl`` (to the starting model), ``hidden`` (of
                hidden states, where the objective has a layer), or ``none``.
            forget_weight: γ, not negative.
            retain_weight: α, not negative; where the objective moves it, what it starts from.
            **parameters: The objective's own.

        Raises:
            OrthoMergeError: With everything that is wrong with the settings.

        >>> get_objective("npo").bind(beta=0.5).retain_weight
        1.0
        """
        from orthomerge.unlearning.objectives.settings import decided

        return decided(self, compat, retain, forget_weight, retain_weight, parameters)


def objective(name: str, *, reference: str, **options: Any) -> Callable[[_Function], _Function]:
    """Register a pure function as an unlearning objective.

    The function gets tensors for its positional arguments, which say by their names what they are:
    ``logits`` [B, T, V] and ``labels`` [B, T] of the forget batch; ``hidden`` [B, T, d] after the
    layer that its parameter ``layer`` names, and ``direction`` [d], a random unit vector drawn once
    by its parameter ``seed``; ``reference_scores`` [B] and ``reference_logits`` [B, T, V] of the
    starting model; ``alternate_logits``, ``alternate_labels`` and ``alternate_reference_scores`` of
    another answer to the same questions. It returns a loss to minimise, without touching its
    inputs. A keyword ``compat`` asks for what the published code does beside its formula.

    Args:
        name: Stable kebab-case id.
        reference: Paper.
        **options: Any other field of ``ObjectiveInfo``, which documents them.
    """

    def register(function: _Function) -> _Function:
        if name in _REGISTRY and _REGISTRY[name].function is not function:
            raise ValueError(f"two objectives are called '{name}'")
        parameters = declared_parameters(function, _RESERVED)
        info = ObjectiveInfo(name, function, reference, parameters=parameters, **options)
        _require_sound(info)
        _REGISTRY[name] = info
        _ALIASES.update(dict.fromkeys(info.aliases, name))
        return function

    return register


def _require_sound(info: ObjectiveInfo) -> None:
    unknown = set(info.arguments) - set(SUPPLIED)
    if unknown:
        raise TypeError(f"{info.name}: no such inputs: {sorted(unknown)}; known: {list(SUPPLIED)}")
    taken = set(info.parameters) & _NOT_PARAMETERS
    if taken:
        raise TypeError(f"{info.name}: every objective has {sorted(taken)} already")
    needed = {"hidden": "layer", "direction": "seed"}
    for argument, parameter in needed.items():
        if argument in info.arguments and parameter not in info.parameters:
            raise TypeError(f"{info.name}: '{argument}' needs a parameter '{parameter}'")
    named = {*info.required, *([info.skips] if info.skips else [])} - set(info.parameters)
    if named or info.retain not in RETAIN_LOSSES:
        raise TypeError(f"{info.name}: unknown {sorted(named) or info.retain}")


@functools.cache
def _load_all() -> None:
    """Import every built-in objective and every installed plug-in, once."""
    import_entries("orthomerge.unlearning.objectives.losses", _ENTRY_POINTS)


def all_objectives() -> dict[str, ObjectiveInfo]:
    """Return every registered objective by name, sorted."""
    _load_all()
    return dict(sorted(_REGISTRY.items()))


def get_objective(name: str) -> ObjectiveInfo:
    """Return one objective by its id or another name it is known by.

    Raises:
        UnknownNameError: With the nearest name.

    >>> get_objective("idk-dpo").name
    'dpo'
    """
    return find_entry("objective", name, all_objectives(), _ALIASES)
