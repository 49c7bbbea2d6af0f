"""Tensor names of a PEFT adapter, and the base model's names they stand for.

Names only; no tensor is looked at.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

from orthomerge.errors import AdapterError

__all__ = ["NOT_IN_BASE", "PREFIX", "base_tensor_name", "base_weight_name", "strip_prefix"]

#: What PEFT puts before every module path when it saves an adapter.
PREFIX = "base_model.model."
#: The problem of a name that a base does not have.
NOT_IN_BASE = "is not in the base model"


def strip_prefix(key: str, *, file: str | None = None) -> str:
    """Return an adapter tensor's name without PEFT's prefix.

    Raises:
        AdapterError: The name does not carry the prefix.

    >>> strip_prefix("base_model.model.encoder.query.oft_R.weight")
    'encoder.query.oft_R.weight'
    """
    if not key.startswith(PREFIX):
        raise AdapterError(
            f"the name does not start with '{PREFIX}'",
            file=file,
            tensor=key,
            remedy="Save the adapter with PeftModel.save_pretrained.",
        )
    return key.removeprefix(PREFIX)


def base_weight_name(module: str, base_names: Collection[str]) -> str:
    """Return the name of a module's weight in the base model.

    Args:
        module: Module path as the adapter writes it, without PEFT's prefix.
        base_names: Tensor names of the base model; a mapping or set makes the exact case cheap.

    Raises:
        AdapterError: No name fits, or several do.

    >>> base_weight_name("encoder.query", {"bert.encoder.query.weight"})
    'bert.encoder.query.weight'
    """
    return base_tensor_name(f"{module}.weight", base_names)


def base_tensor_name(name: str, base_names: Collection[str]) -> str:
    """Return the base model's name for a tensor of the adapter.

    The same name first; else the one name that differs by a leading prefix only, as when the
    adapter was trained on ``BertModel`` and the base file holds ``BertForMaskedLM`` or vice versa.

    Args:
        name: Tensor name as the adapter writes it, without PEFT's prefix.
        base_names: Tensor names of the base model.

    Raises:
        AdapterError: No name fits, or several do.

    >>> base_tensor_name("bert.pooler.bias", {"pooler.bias", "embeddings.weight"})
    'pooler.bias'
    """
    if name in base_names:
        return name
    longer = [other for other in base_names if other.endswith(f".{name}")]
    # A bare parameter ("weight") would be the end of every name; it says nothing.
    shorter = [other for other in base_names if "." in other and name.endswith(f".{other}")]
    found = sorted({*longer, *shorter})
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(
            "fits several tensors of the base model",
            tensor=name,
            found=", ".join(found[:4]),
            remedy="Load the adapter on its own base model with PEFT and save that model.",
        )
    near = difflib.get_close_matches(name, base_names, n=3, cutoff=0.7)
    raise AdapterError(
        NOT_IN_BASE,
        tensor=name,
        expected=f"one of its tensors, e.g. {', '.join(near)}" if near else "one of its tensors",
        remedy="Give the base model that the adapter was trained on.",
    )
