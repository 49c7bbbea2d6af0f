"""The starting model during training: its scores, logits and hidden states, without gradients.

Three ways to have it: the model with its adapter off, a copy of it, or scores computed beforehand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from orthomerge.errors import AdapterError, RecipeError
from orthomerge.unlearning.objectives.forwards import (
    forward_hidden,
    forward_logits,
    without_wrappers,
)
from orthomerge.unlearning.objectives.scores import lifted, sequence_losses

__all__ = ["AdapterOff", "FrozenCopy", "Reference", "reference_pass"]

_OWN_PARAMETERS = ("modules_to_save", "prompt_encoder", "trainable_tokens")


class Reference(Protocol):
    """The starting model, as objectives ask for it; nothing it returns has a gradient."""

    def scores(self, batch: Mapping[str, Tensor], *, part: str = "forget") -> Tensor:
        """Return the sequence losses S^ref [B]; ``part`` is the batch's name: forget, alternate."""

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits [B, T, V]."""

    def hidden(self, batch: Mapping[str, Tensor], layer: int | None) -> Tensor:
        """Return the hidden states [B, T, d] after one layer, counted from 0; None: the default."""


class _ByRunning:
    """A reference that runs a model; the subclass says which, and what is switched off for it."""

    def _model(self) -> Any:
        raise NotImplementedError

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        model = self._model()
        with reference_pass(model):
            yield model

    def scores(self, batch: Mapping[str, Tensor], *, part: str = "forget") -> Tensor:
        """Return the sequence losses S^ref [B]."""
        del part  # the rows themselves are at hand
        with self._ready() as model:
            return sequence_losses(forward_logits(model, batch), batch["labels"])[0]

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits [B, T, V]."""
        with self._ready() as model:
            return forward_logits(model, batch)

    def hidden(self, batch: Mapping[str, Tensor], layer: int | None) -> Tensor:
        """Return the hidden states [B, T, d] after one layer."""
        with self._ready() as model:
            return forward_hidden(model, batch, layer)


class AdapterOff(_ByRunning):
    """A PEFT model without its adapter: no copy, one more pass.

    Args:
        model: The PEFT model, wrapped or not, before it is trained.

    Raises:
        AdapterError: Switching the adapter off does not give the model as it is now: the adapter
            already changes it, is merged, or something beside it is trained.
    """

    def __init__(self, model: Any) -> None:
        self._peft = without_wrappers(model)
        reason = _why_not_off(self._peft)
        if reason:
            raise AdapterError(
                f"the model without its adapter is not the starting model: {reason}",
                remedy="Use FrozenCopy, or CachedScores where the objective needs scores only.",
            )

    def _model(self) -> Any:
        return self._peft

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        with reference_pass(self._peft), _adapter_off(self._peft):
            yield self._peft


class FrozenCopy(_ByRunning):
    """A copy of the model as it is now; parameters that are not trained now are shared, not copied.

    So of a PEFT model only the adapter is copied. A parameter that is frozen when this is made
    must stay as it is.

    Args:
        model: The model, before it is trained and before accelerate prepares it.

    Raises:
        RecipeError: accelerate has replaced the model's forward; a copy's would run the original.
    """

    def __init__(self, model: Any) -> None:
        original = without_wrappers(model)
        if "_original_forward" in vars(original):
            raise RecipeError(
                "a model that accelerate has prepared cannot be copied",
                remedy="Make the reference first, then prepare the model or start the trainer.",
            )
        shared = {id(p): p for p in original.parameters() if not p.requires_grad}
        self._copy = copy.deepcopy(original, shared).requires_grad_(False)

    def _model(self) -> Any:
        return self._copy


@contextmanager
def reference_pass(model: torch.nn.Module) -> Iterator[None]:
    """Run the block without gradients and in evaluation mode; restore every module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """Switch the adapter off; PEFT makes all of it trainable again after, also what was frozen."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


def _why_not_off(model: Any) -> str | None:
    """Return why the model without adapter is not the model as it is, or None."""
    if not hasattr(model, "disable_adapter"):
        return "it has none"
    prefix = getattr(model.base_model, "prefix", None)
    own = (*_OWN_PARAMETERS, *([prefix] if prefix else []))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in own):
            return f"'{name}' is trained, too"
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        return "the adapter is merged into its weights"
    return None if _same_without(model) else "the adapter already changes it"


def _same_without(model: Any) -> bool:
    """Return whether the logits of a few tokens are the same with and without the adapter."""
    embeddings = model.get_input_embeddings()
    ids = torch.linspace(0, embeddings.num_embeddings - 1, 16, device=embeddings.weight.device)
    batch = {"input_ids": ids.long()[None], "attention_mask": torch.ones_like(ids.long()[None])}
    with reference_pass(model):
        on = forward_logits(model, batch)
        with _adapter_off(model):
            off = forward_logits(model, batch)
    tolerance = 8 * torch.finfo(on.dtype).eps * lifted(off).abs().max()
    return bool((lifted(on) - lifted(off)).abs().max() <= tolerance)
