"""The door for LoRA adapters, those of a loaded PEFT model among them: ``merge_lora``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters.memory import (
    AdapterState,
    adapter_states,
    load_adapter_state,
    require_new_name,
)
from orthomerge.errors import RecipeError
from orthomerge.recipe.run import merge

if TYPE_CHECKING:
    from orthomerge.merging.run import MergeResult

__all__ = ["merge_lora"]


def merge_lora(
    adapters: Any,
    *,
    names: Sequence[str] | None = None,
    into: str | None = None,
    form: str = "auto",
    rank: int | str | None = None,
    output: str | Path | None = None,
    **settings: Any,
) -> MergeResult:
    """Merge LoRA adapters into one adapter: folders, files, or those of a loaded PEFT model.

    Without a method it is ``do-merging``; the docs of ``merge`` describe all other settings.

    Args:
        adapters: Paths, ``AdapterState`` objects, or a ``PeftModel`` with several adapters.
        names: Adapters of the ``PeftModel``, in this order; default: all.
        into: Name under which the merged adapter is added to the ``PeftModel``; it is not made
            the active one.
        form: ``auto``, ``lora``, ``dora`` (needs ``base``) or ``full`` (needs ``base``).
        rank: Rank of the result: a number, ``"energy:0.99"``, ``"parameters:1000000"``; default:
            lossless.
        output: Folder to write; default: the result stays in memory.
        **settings: ``weights``, ``method``, its parameters, and whatever else ``merge`` takes.

    Returns:
        The result: ``adapter`` holds tensors and config when no ``output`` was given.

    Raises:
        OrthoMergeError: Something is wrong; nothing is written or added then.

    Example:
        >>> import torch
        >>> from orthomerge.adapters import AdapterState
        >>> keys = [f"base_model.model.q.lora_{side}.weight" for side in "BA"]
        >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        >>> one = AdapterState(dict.fromkeys(keys, torch.ones(1, 1)), config, "one")
        >>> B, A = (merge_lora([one, one], method="sum").adapter.tensors[key] for key in keys)
        >>> round(float(B @ A), 5)
        2.0
    """
    model = None if isinstance(adapters, list | tuple) else adapters
    if model is None and (names is not None or into is not None):
        raise RecipeError(
            "names and into belong to the adapters of a loaded PEFT model",
            remedy="Pass the PeftModel itself, or leave them out.",
        )
    if into is not None and output is not None:
        raise RecipeError(
            "the merged adapter is either written or added to the model",
            remedy="Leave out output, and save the model's adapter with save_pretrained.",
        )
    if into is not None:
        require_new_name(model, into)
    sources: Sequence[Any] = adapters if model is None else adapter_states(model, names)
    own = {**(settings.pop("output_settings", None) or {}), "form": form, "rank": rank}
    result = merge(sources, output=output, output_settings=own, **settings)
    if into is not None:
        load_adapter_state(model, _required(result), into)
    return result


def _required(result: MergeResult) -> AdapterState:
    adapter = result.adapter
    if adapter is None:
        raise RecipeError(
            "a full checkpoint cannot be added to the model as an adapter",
            remedy="Leave form and base out.",
        )
    return adapter
