"""Sort the tensors of an adapter: parameters by module, whole tensors, copies of base weights.

Names only. Which parameters exist is each adapter kind's own business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from orthomerge.adapters.keys import strip_prefix
from orthomerge.errors import AdapterError, OrthoMergeError, combined

if TYPE_CHECKING:
    from orthomerge.checkpoints.header import TensorInfo

__all__ = [
    "DAMAGED",
    "FLOATS",
    "Contents",
    "build_modules",
    "is_parameter",
    "malformed",
    "read_contents",
]

FLOATS = ("F16", "BF16", "F32", "F64")
# Prefixes of the parameters that adapters of any kind have.
_PARAMETER = re.compile(
    r"(?:ada)?lora_|boft_|hra_|ia3_|vera_|hada_|lokr_|vblora_|ln_tuning_|fourierft_|oft_"
)
_Module = TypeVar("_Module")
#: What to do with tensors that PEFT cannot have written.
DAMAGED = "The adapter is damaged or was edited; save it again with PEFT."


@dataclass
class Contents:
    """The tensors of an adapter.

    Attributes:
        parameters: Module path -> parameter name -> header.
        others: Whole tensors that replace the base's: base tensor name -> name in the adapter.
        base_copies: Copies of base weights, likewise.
        problems: What could not be sorted, the first of each kind.
    """

    parameters: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    base_copies: dict[str, str] = field(default_factory=dict)
    problems: dict[str, OrthoMergeError] = field(default_factory=dict)


def read_contents(
    tensors: Mapping[str, TensorInfo], origin: str, parameters: Sequence[str], label: str
) -> Contents:
    """Sort the tensors of an adapter of one kind.

    Args:
        tensors: Headers by name.
        origin: Where they came from, for messages.
        parameters: Names of the kind's parameters, e.g. ``"lora_A.weight"``.
        label: Name of the kind, for messages.
    """
    contents = Contents()
    for key, info in tensors.items():
        try:
            _sort(strip_prefix(key, file=origin), info, origin, parameters, label, contents)
        except OrthoMergeError as error:
            contents.problems.setdefault(error.problem, error)
    return contents


def _sort(
    name: str,
    info: TensorInfo,
    origin: str,
    parameters: Sequence[str],
    label: str,
    contents: Contents,
) -> None:
    found = next((one for one in parameters if name.endswith(f".{one}")), None)
    if found is not None:
        module = name.removesuffix(f".{found}")
        if ".base_layer." in module:
            raise AdapterError(
                "adapts a layer inside another adapted layer (nn.MultiheadAttention), "
                "whose effect differs between PEFT versions",
                file=origin,
                tensor=info.name,
                remedy="Merge it into its base with the PEFT that trained it, and merge the full "
                "models.",
            )
        contents.parameters.setdefault(module, {})[found] = info
        return
    # The parameter's name is the last part, or followed by ".weight" and the adapter's name.
    foreign = next((part for part in name.split(".")[-3:] if _PARAMETER.match(part)), None)
    if foreign is not None:
        raise AdapterError(
            f"'{foreign}' is no parameter of a known {label} layout",
            file=origin,
            tensor=info.name,
            expected=", ".join(parameters),
            remedy="Save each adapter on its own, with PeftModel.save_pretrained.",
        )
    if name.endswith(".base_layer.weight"):
        contents.base_copies[name.replace(".base_layer.", ".")] = info.name
    else:
        contents.others[name.replace(".base_layer.", ".")] = info.name


def is_parameter(key: str) -> bool:
    """Return whether a name is one of an adapter's own parameters, of whatever kind.

    >>> is_parameter("a.q.lora_A.weight"), is_parameter("a.q.base_layer.bias")
    (True, False)
    """
    return any(_PARAMETER.match(part) for part in key.split("."))


def build_modules(
    contents: Contents,
    build: Callable[[str, Mapping[str, TensorInfo]], _Module],
    origin: str,
    label: str,
) -> dict[str, _Module]:
    """Turn each module's headers into what the adapter's kind makes of them.

    Raises:
        AdapterError: Something is malformed, or there are no modules.
        ProblemsError: Several of these, one per kind of problem.
    """
    modules: dict[str, _Module] = {}
    for name, infos in contents.parameters.items():
        try:
            for info in infos.values():
                if info.dtype not in FLOATS:
                    raise malformed(
                        origin, info, "has an unsupported dtype", ", ".join(FLOATS), info.dtype
                    )
            modules[name] = build(name, infos)
        except OrthoMergeError as error:
            contents.problems.setdefault(error.problem, error)
    if not modules and not contents.problems:
        contents.problems[""] = AdapterError(f"holds no {label} tensors", file=origin)
    if contents.problems:
        raise combined(list(contents.problems.values()))
    return modules


def malformed(
    origin: str,
    info: TensorInfo,
    problem: str,
    expected: object,
    found: object,
    remedy: str = DAMAGED,
) -> AdapterError:
    """Return the error of a tensor that PEFT, or whatever wrote the file, cannot have written."""
    return AdapterError(
        problem,
        file=origin,
        tensor=info.name,
        expected=expected,
        found=found,
        remedy=remedy,
    )
