"""Run a causal language model on one set's batch, for its logits or the hidden states of a layer.

Labels are never passed on: every loss is made here from the logits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orthomerge.errors import RecipeError

__all__ = ["default_layer", "forward_hidden", "forward_logits", "without_wrappers"]

_WRAPPERS = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)


def without_wrappers(model: Any) -> Any:
    """Return the model inside ``DistributedDataParallel`` and the like; a PEFT model stays one."""
    while isinstance(model, _WRAPPERS):
        model = model.module
    return model


def forward_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits [B, T, V] of a batch, in the dtype the model gives them in."""
    logits: Tensor = model(**_inputs(batch), use_cache=False).logits
    return logits


def default_layer(depth: int) -> int:
    """Return the last layer of the first quarter of a model, counted from 0: the 7 of 32.

    >>> default_layer(32), default_layer(16), default_layer(2)
    (7, 3, 0)
    """
    return math.ceil(depth / 4) - 1


def forward_hidden(model: Any, batch: Mapping[str, Tensor], layer: int | None) -> Tensor:
    """Return the hidden states [B, T, d] after one layer.

    The whole model is run, as its wrappers (sharding, checkpointing) expect; where it can, it
    makes the logits of one position only. What lies above the layer is freed on return.

    Args:
        model: Any model that knows ``output_hidden_states``.
        batch: One set's batch.
        layer: Counted from 0, as in the names of modules; the last one is after the final norm.
            None for ``default_layer``.

    Raises:
        RecipeError: The model has no such layer, or a gradient is wanted and the states have none.
    """
    options: dict[str, Any] = {"output_hidden_states": True, "use_cache": False}
    if _takes(model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    states = model(**_inputs(batch), **options).hidden_states
    depth = len(states) - 1
    place = default_layer(depth) if layer is None else layer
    if not 0 <= place < depth:
        raise RecipeError("no such layer", expected=f"0 to {depth - 1}", found=layer)
    hidden: Tensor = states[place + 1]
    if torch.is_grad_enabled() and not hidden.requires_grad:
        raise RecipeError(
            f"the hidden states after layer {place} depend on nothing that is trained",
            remedy="Train parameters of this layer or below, or choose a later layer; with "
            "gradient checkpointing set use_reentrant to false.",
        )
    return hidden


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _takes(model: Any, argument: str) -> bool:
    inner = without_wrappers(model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return argument in inspect.signature(inner.forward).parameters
