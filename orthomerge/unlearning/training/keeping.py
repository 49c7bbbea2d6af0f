"""Keep a copy of what is trained, on the host, to go back to and to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthomerge.errors import NumericalError

__all__ = ["Snapshot", "require_changed", "trained"]


def trained(model: Any) -> dict[str, Tensor]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Snapshot:
    """Copies of the trained parameters at one moment.

    Args:
        model: Whose parameters are copied.
        step: The moment.
    """

    def __init__(self, model: Any, step: int = 0) -> None:
        self.step = step
        self.tensors = {n: p.detach().cpu().clone() for n, p in trained(model).items()}

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Put the copies back."""
        for name, parameter in trained(model).items():
            parameter.copy_(self.tensors[name])

    def state(self) -> dict[str, Any]:
        """Return the content, for ``torch.save``."""
        return {"step": self.step, "tensors": self.tensors}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Snapshot:
        """Return what ``state`` was taken of."""
        self = cls.__new__(cls)
        self.step, self.tensors = state["step"], state["tensors"]
        return self


def require_changed(model: Any, start: Snapshot) -> None:
    """Refuse a model whose trained parameters are what they were at the start.

    Raises:
        NumericalError: None has changed, or one is not finite.
    """
    changed = False
    for name, parameter in trained(model).items():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericalError("a trained parameter is not finite", tensor=name)
        changed = changed or not torch.equal(parameter.detach().cpu(), start.tensors[name])
    if not changed:
        raise NumericalError(
            "no trained parameter has changed, so nothing was forgotten and nothing is written",
            remedy="Raise train.learning_rate, or train.max_steps; in low precision small steps "
            "round to nothing.",
        )
