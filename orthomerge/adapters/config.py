"""Read the ``adapter_config.json`` of a PEFT adapter folder.

Only the file and its ``peft_type`` are checked; what the other values mean is read by the module
of that adapter kind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from orthomerge.errors import AdapterError

__all__ = ["CONFIG_NAME", "AdapterConfig", "read_adapter_config"]

CONFIG_NAME = "adapter_config.json"
Value = TypeVar("Value", bool, int, float, str)
_RESAVE = "Give the folder that PeftModel.save_pretrained wrote."


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter says of itself.

    Attributes:
        peft_type: Kind of adapter in PEFT's spelling, upper case, e.g. ``"OFT"``.
        values: All entries of the file.
        path: The file, for messages.
    """

    peft_type: str
    values: dict[str, Any] = field(repr=False)
    path: Path

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list-valued entry sorted, a single string as one name, null as none.

        Raises:
            AdapterError: The entry is neither null, a string nor a list of strings.

        >>> config = AdapterConfig("OFT", {"target_modules": ["v", "q"]}, Path("a.json"))
        >>> config.names("target_modules")
        ('q', 'v')
        """
        value = self.values.get(key)
        names = [value] if isinstance(value, str) else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AdapterError(
                f"{key} must be a list of names", file=self.path, found=value, remedy=_RESAVE
            )
        return tuple(sorted(set(names)))

    def value(self, key: str, kind: type[Value], default: Value) -> Value:
        """Return a single-valued entry; absent and null give the default.

        Raises:
            AdapterError: The entry has another type; an integer passes for a float.

        >>> AdapterConfig("OFT", {"eps": 1}, Path("a.json")).value("eps", float, 6e-5)
        1.0
        """
        value = self.values.get(key)
        if value is None:
            return default
        # bool is an int to Python, but not to whoever wrote the file.
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise AdapterError(
                f"{key} has the wrong type",
                file=self.path,
                expected=kind.__name__,
                found=repr(value),
                remedy=_RESAVE,
            )
        result: Value = kind(value)
        return result


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read the config of the adapter in folder ``path``.

    Args:
        path: An adapter folder, as written by ``PeftModel.save_pretrained``.

    Raises:
        AdapterError: There is no config, it is not a JSON object, or it names no ``peft_type``.
    """
    file = path / CONFIG_NAME
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise AdapterError(
            f"cannot be read: {error.strerror}",
            file=file,
            remedy=f"Tensors without their config cannot be interpreted. {_RESAVE}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"is not valid JSON: {error}", file=file, remedy=_RESAVE) from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or not kind:
        raise AdapterError(
            "is not the config of a PEFT adapter",
            file=file,
            expected="a JSON object with a peft_type",
            found=f"peft_type {kind!r}" if isinstance(values, dict) else type(values).__name__,
            remedy=_RESAVE,
        )
    return AdapterConfig(kind.upper(), values, file)
