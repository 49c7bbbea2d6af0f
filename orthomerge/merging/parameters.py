"""Parameters that only merge methods have: another method, and the kept fraction of a task vector.

What every parameter has is in ``orthomerge.parameters``; how a value may vary from tensor to tensor
is in ``rules``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from orthomerge.merging.spaces import Space
from orthomerge.parameters import Between, OwnKind, Parameter

__all__ = ["Density", "NestedLoraMethod", "NestedMethod", "NestedParameter"]

#: The kept fraction of a task vector's entries.
Density = Annotated[float, Between(0, 1, open_low=True)]


@dataclass(frozen=True, slots=True)
class NestedParameter(Parameter):
    """A parameter that names another method; its ``kind`` is ``dict``.

    Args:
        nested_space: What the nested method must merge.
    """

    nested_space: Space = Space.DELTA

    @property
    def allowed(self) -> str:
        """Say in words what may be given."""
        named = "a method of task vectors, or {method: name, parameter: value, ...}"
        return f"{named} | null" if self.optional else named

    def check(self, value: Any) -> Any:
        """Return the method and all its parameters, those that were not given at their defaults.

        Raises:
            UnknownNameError: No such method, or no such parameter of it.
            RecipeError: It names no method, or one that does not fit here.
        """
        from orthomerge.merging.nesting import nested_method

        if value is None and self.optional:
            return None
        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("method"), str):
            raise self.refusal(value)
        return nested_method(self.name, value, self.nested_space)


@dataclass(frozen=True, slots=True)
class _Nested(OwnKind):
    """Marks a parameter whose value names another method, with that method's parameters."""

    space: Space = Space.DELTA

    def parameter(self, name: str, default: Any, help: str, optional: bool) -> Parameter:
        return NestedParameter(
            name, dict, default, help=help, optional=optional, nested_space=self.space
        )


#: Another method of DELTA space, as its name or as ``{method: name, parameter: value, ...}``; None
#: lets the outer method decide. The function gets the mapping with every parameter filled in.
NestedMethod = Annotated[Mapping[str, Any] | str | None, _Nested()]

#: Likewise, a method that can merge low-rank factors.
NestedLoraMethod = Annotated[Mapping[str, Any] | str | None, _Nested(Space.FACTORS)]
