"""Adapters that are in memory, those of a loaded PEFT model among them.

What their tensors mean is read by the same code as for files.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.contents import is_parameter
from orthomerge.adapters.keys import PREFIX
from orthomerge.errors import AdapterError, MissingExtraError, RecipeError, UnknownNameError

if TYPE_CHECKING:
    import torch

__all__ = [
    "AdapterState",
    "adapter_states",
    "load_adapter_state",
    "require_new_name",
    "state_config",
]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterState:
    """An adapter in memory, for ``open_source``.

    Attributes:
        tensors: By the names PEFT saves them under, without the adapter's name; they may share
            storage with each other and with a live model, and are not written to.
        config: What ``adapter_config.json`` would hold; PEFT's enums, sets and tuples are fine.
        name: For messages.

    >>> import torch
    >>> tensors = {"base_model.model.q.lora_A.weight": torch.ones(1, 4)}
    >>> AdapterState(tensors, {"peft_type": "LORA", "r": 1}, "mine")
    AdapterState(config={'peft_type': 'LORA', 'r': 1}, name='mine')
    """

    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    config: Mapping[str, Any]
    name: str = "adapter in memory"


def state_config(state: AdapterState) -> AdapterConfig:
    """Return the config of an adapter in memory, as its JSON file would be read.

    Raises:
        AdapterError: It is no mapping with a ``peft_type``.
    """
    values = _plain(state.config)
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or not kind:
        raise AdapterError(
            "is not the config of a PEFT adapter",
            file=state.name,
            expected="a mapping with a peft_type",
            found=f"peft_type {kind!r}" if isinstance(values, dict) else type(values).__name__,
            remedy="Pass model.peft_config[name].to_dict().",
        )
    return AdapterConfig(kind.upper(), values, Path(state.name))


def adapter_states(model: Any, names: Sequence[str] | str | None = None) -> list[AdapterState]:
    """Return adapters of a loaded PEFT model, without a file and without copying their tensors.

    Models that got their adapters without ``PeftModel`` (``add_adapter`` of transformers and
    diffusers) are taken as well. Embeddings that were resized are the base's business and left out.

    Args:
        model: A ``PeftModel``, or another model with a ``peft_config`` per adapter.
        names: Adapters wanted, in this order; None for all.

    Raises:
        AdapterError: The model has no adapters, or PEFT mistakes one's name for a module's.
        UnknownNameError: It has none of this name.
        MissingExtraError: PEFT is not installed.
    """
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError("peft", "demo", "Reading a PEFT model's adapters") from error

    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise AdapterError(
            "has no PEFT adapters",
            found=type(model).__name__,
            remedy="Pass a PeftModel, or the adapters' folders.",
        )
    wanted = [names] if isinstance(names, str) else list(configs if names is None else names)
    states = []
    for name in wanted:
        if name not in configs:
            raise UnknownNameError("adapter", name, configs)
        with warnings.catch_warnings():
            # Said of every bias of B; shapes are checked when the adapter is opened.
            warnings.filterwarnings("ignore", message=".*have invalid shape")
            found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        _check_complete(model, name, configs, found)
        tensors = {
            key if key.startswith(PREFIX) else f"{PREFIX}{key}": value.detach()
            for key, value in found.items()
        }
        states.append(AdapterState(tensors, _plain(configs[name].to_dict()), name))
    return states


def load_adapter_state(model: Any, state: AdapterState, name: str) -> None:
    """Add an adapter in memory to a loaded PEFT model, under a name of its own.

    The adapter that is active stays active; ``model.set_adapter(name)`` switches to the new one.

    Args:
        model: A ``PeftModel``.
        state: The adapter.
        name: Its name in the model.

    Raises:
        AdapterError: The model has an adapter of this name, or no place for some of the tensors.
        RecipeError: No adapter can have this name.
        MissingExtraError: PEFT is not installed.
    """
    try:
        from peft import set_peft_model_state_dict
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType
    except ImportError as error:
        raise MissingExtraError("peft", "demo", "Adding an adapter to a PEFT model") from error

    require_new_name(model, name)
    values = dict(state.config)
    kind = PeftType(str(values.pop("peft_type")).upper())
    model.add_adapter(name, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**values))
    loaded = set_peft_model_state_dict(model, dict(state.tensors), adapter_name=name)
    if loaded.unexpected_keys:
        model.delete_adapter(name)
        raise AdapterError(
            "the model has no place for this tensor of the adapter",
            file=state.name,
            tensor=loaded.unexpected_keys[0],
            remedy="Load it into the base model that the adapters were trained on.",
        )


def require_new_name(model: Any, name: str) -> None:
    """Refuse a name under which no adapter can be added to a loaded PEFT model.

    Raises:
        AdapterError: The model has an adapter of this name.
        RecipeError: PyTorch allows no module of this name: it is empty, has a dot, ...
    """
    from torch.nn import Identity, ModuleDict

    if name in getattr(model, "peft_config", {}):
        raise AdapterError(
            f"the model has an adapter '{name}' already",
            remedy="Choose another name, or model.delete_adapter it first.",
        )
    try:
        ModuleDict({name: Identity()})  # where PEFT keeps an adapter's factors
    except KeyError:
        raise RecipeError(
            "PEFT cannot add an adapter of this name",
            found=f"{name!r}",
            remedy="Choose another, e.g. 'merged'; it cannot have a dot.",
        ) from None


def _check_complete(
    model: Any, name: str, names: Mapping[str, Any], found: Mapping[str, torch.Tensor]
) -> None:
    """Refuse when PEFT, which tells adapters by parts of paths, took modules for adapters."""
    own = sum(_owner(key, names) == name for key in model.state_dict())
    got = sum(is_parameter(key) for key in found)
    if got < own and len(names) > 1:
        raise AdapterError(
            "PEFT finds only some of this adapter's tensors: one of the adapters is called like a "
            "module of the model",
            file=name,
            expected=f"{own} tensors",
            found=f"{got}, beside the adapters {', '.join(names)}",
            remedy="Load the adapters under other names.",
        )


def _owner(key: str, names: Mapping[str, Any]) -> str | None:
    """Return the adapter whose parameter a tensor of the live model is."""
    parts = key.split(".")
    pairs = pairwise(parts)
    return next((name for part, name in pairs if is_parameter(part) and name in names), None)


def _plain(value: Any) -> Any:
    """Return a value of a PEFT config as JSON would give it back."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value)
