"""The dtype names of the safetensors format, their sizes, and their torch counterparts.

Knows nothing of files. torch is imported only by the two functions that need it, because planning
a merge must not pay for that import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.errors import RecipeError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONFIG_NAMES",
    "FLOAT_DTYPES",
    "ITEM_SIZES",
    "dtype_from_name",
    "safetensors_dtype",
    "torch_dtype",
]

# safetensors name -> torch attribute name, in the order of the format's own documentation.
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}

ITEM_SIZES: dict[str, int] = {
    "BOOL": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "BF16": 2,
    "C64": 8,
    **{kind + bits: size for kind in "FIU" for bits, size in _SIZES.items() if kind + bits != "F8"},
}

#: Dtypes that can be averaged, widest last.
FLOAT_DTYPES: tuple[str, ...] = (
    "F8_E5M2",
    "F8_E5M2FNUZ",
    "F8_E4M3",
    "F8_E4M3FNUZ",
    "F16",
    "BF16",
    "F32",
    "F64",
)

#: safetensors name -> the name used in a model's config.json and on the command line.
CONFIG_NAMES: dict[str, str] = {name: _TORCH_NAMES[name] for name in FLOAT_DTYPES}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for a safetensors dtype name."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def safetensors_dtype(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype."""
    attribute = str(dtype).removeprefix("torch.")
    for name, torch_name in _TORCH_NAMES.items():
        if torch_name == attribute:
            return name
    raise RecipeError(
        f"dtype {attribute} has no place in the safetensors format",
        remedy=f"Convert it to one of {', '.join(_TORCH_NAMES.values())}.",
    )


def dtype_from_name(name: str) -> str:
    """Return the safetensors name for a user's spelling of a floating dtype.

    Accepts torch names (``bfloat16``), safetensors names (``BF16``) and the short forms ``bf16``,
    ``fp16``, ``half``, ``float``.
    """
    aliases = {"fp16": "F16", "fp32": "F32", "fp64": "F64", "half": "F16", "float": "F32"}
    aliases |= {torch_name: key for key, torch_name in CONFIG_NAMES.items()}
    key = name.removeprefix("torch.").lower()
    found = aliases.get(key, key.upper())
    if found not in FLOAT_DTYPES:
        choices = ", ".join(CONFIG_NAMES.values())
        raise RecipeError(
            f"'{name}' is not a floating-point dtype", remedy=f"Choose one of {choices}."
        )
    return found
