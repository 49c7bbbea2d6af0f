"""LoRA adapters in one file without a config: kohya's and diffusers', read into ``LoraAdapter``.

Their scale is in the file: an ``alpha`` tensor beside the factors, PEFT's config in diffusers'
metadata, or 1. How the tensors are called is in ``lora_styles``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.contents import Contents, build_modules, malformed
from orthomerge.adapters.lora import LoraAdapter, LoraModule, check_factors, one_per_feature
from orthomerge.adapters.lora_settings import lora_alpha, lora_problems, lora_scale
from orthomerge.adapters.lora_styles import (
    ADAPTER_METADATA,
    LoraPart,
    LoraStyle,
    component_of,
    split_lora_key,
    unsupported_part,
)
from orthomerge.errors import AdapterError, NumericalError, OrthoMergeError

if TYPE_CHECKING:
    from orthomerge.checkpoints.header import TensorInfo
    from orthomerge.checkpoints.reader import Checkpoint

__all__ = ["read_lora_file"]

_RESAVE = "The adapter is damaged or was edited; save it again with the program that trained it."
# How a number of each dtype is unpacked; BF16 is the upper half of a F32.
_ALPHA_FORMATS = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "I16": "<h"}


@dataclass
class _Scales:
    """What a file says of its scales.

    Attributes:
        alphas: Module -> value of its alpha tensor, and the tensor's name.
        configs: Component ("" for all) -> PEFT's config from the metadata.
    """

    alphas: dict[str, tuple[float, str]] = field(default_factory=dict)
    configs: dict[str, AdapterConfig] = field(default_factory=dict)

    def of(self, module: str, rank: int) -> tuple[float, float, str | None]:
        """Return a module's alpha, its scale, and the name of the alpha tensor."""
        if module in self.alphas:
            alpha, key = self.alphas[module]
            return alpha, alpha / rank, key
        component = component_of(module) or ""
        config, path = self.configs.get(component), module.removeprefix(f"{component}.")
        if config is None:
            return float(rank), 1.0, None
        return lora_alpha(config, path), lora_scale(config, path, rank), None


def read_lora_file(checkpoint: Checkpoint, style: LoraStyle) -> LoraAdapter:
    """Read a LoRA adapter of kohya's or diffusers' style; headers, metadata and alphas only.

    The scale of a module is ``alpha / r`` where it has an alpha tensor, what PEFT's config says
    where diffusers saved that in the metadata, else 1.

    Args:
        checkpoint: The opened file.
        style: From ``lora_styles.file_style``.

    Raises:
        AdapterError: It is a variant that is no product of two factors, or malformed.
        NumericalError: An alpha is not finite.
        ProblemsError: Several of these, one per kind of problem.
    """
    origin = checkpoint.origin
    contents, alphas = _sorted(checkpoint, style)
    scales = _Scales()
    try:
        scales.configs = _configs(checkpoint) if style == "diffusers" else {}
        for config in scales.configs.values():
            contents.problems |= {error.problem: error for error in lora_problems(config)}
    except OrthoMergeError as error:
        contents.problems.setdefault(error.problem, error)
    for module, info in alphas.items():
        try:
            if module not in contents.parameters:
                raise _broken(origin, info, "an alpha without factors", "lora_down and lora_up")
            scales.alphas[module] = _alpha(checkpoint, info), info.name
        except OrthoMergeError as error:
            contents.problems.setdefault(error.problem, error)
    _check_agreement(scales, contents, origin, style)
    modules = build_modules(
        contents, lambda name, infos: _module(name, infos, scales, origin, style), origin, "LoRA"
    )
    path = checkpoint.files[0] if checkpoint.files else Path(origin)
    config = AdapterConfig("LORA", {}, path)
    return LoraAdapter(origin, config, modules, {}, {}, checkpoint, style)


def _sorted(checkpoint: Checkpoint, style: LoraStyle) -> tuple[Contents, dict[str, TensorInfo]]:
    """Return the tensors by module and part, and the alphas by module."""
    contents, alphas = Contents(), dict[str, "TensorInfo"]()
    for name, info in checkpoint.tensors.items():
        split = split_lora_key(name)
        unsupported = unsupported_part(name)
        if split is None or unsupported is not None:
            error = _unknown(checkpoint.origin, name, style, unsupported)
            contents.problems.setdefault(error.problem, error)
            continue
        module, part = split
        home = alphas if part == "alpha" else contents.parameters.setdefault(module, {})
        slot = module if part == "alpha" else part
        if slot in home:
            error = _broken(
                checkpoint.origin, info, "two tensors are the same part of a module", home[slot]
            )
            contents.problems.setdefault(error.problem, error)
        home[slot] = info
    return contents, alphas


def _module(
    name: str,
    infos: Mapping[str, TensorInfo],
    scales: _Scales,
    origin: str,
    style: LoraStyle,
) -> LoraModule:
    first = next(iter(infos.values()))
    if "A" not in infos or "B" not in infos:
        wanted = "lora_down and lora_up" if style == "kohya" else "lora_A and lora_B"
        raise _broken(origin, first, "one factor of a module is missing", wanted)
    A, B = infos["A"], infos["B"]
    check_factors(A, B, origin, remedy=_RESAVE)
    optional: tuple[tuple[LoraPart, str], ...] = (("magnitude", "magnitude"), ("bias", "bias"))
    for part, what in optional:
        if part in infos:
            one_per_feature(infos[part], B.shape[0], what, origin, remedy=_RESAVE)
    rank = A.shape[0]
    alpha, scale, alpha_key = scales.of(name, rank)
    return LoraModule(
        name=name,
        kind="conv" if len(A.shape) > 2 else "linear",
        rank=rank,
        alpha=alpha,
        scale=scale,
        rows=B.shape[0],
        shape=A.shape[1:],
        a_key=A.name,
        b_key=B.name,
        magnitude_key=infos["magnitude"].name if "magnitude" in infos else None,
        bias_key=infos["bias"].name if "bias" in infos else None,
        dtype=A.dtype,
        alpha_key=alpha_key,
    )


def _alpha(checkpoint: Checkpoint, info: TensorInfo) -> float:
    """Read one alpha; 0 is refused because programs disagree about what it means."""
    if info.numel != 1 or info.dtype not in (*_ALPHA_FORMATS, "BF16"):
        raise _broken(checkpoint.origin, info, "an alpha is not one number", "a scalar")
    alpha = _number(checkpoint, info)
    if not math.isfinite(alpha):
        raise NumericalError(
            "an alpha is not finite",
            file=checkpoint.origin,
            tensor=info.name,
            found=alpha,
            remedy=_RESAVE,
        )
    if alpha == 0:
        raise AdapterError(
            "an alpha is 0, which some programs read as no effect and others as a scale of 1",
            file=checkpoint.origin,
            tensor=info.name,
            remedy="Save it with the rank as its alpha for a scale of 1.",
        )
    return alpha


def _number(checkpoint: Checkpoint, info: TensorInfo) -> float:
    """Read a tensor of one number; without torch, which planning does without."""
    raw = bytearray(info.nbytes)
    checkpoint.read_into(info.name, memoryview(raw))
    if info.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack(_ALPHA_FORMATS[info.dtype], raw)[0])


def _configs(checkpoint: Checkpoint) -> dict[str, AdapterConfig]:
    """Return PEFT's configs from diffusers' metadata, by component; "" where it names none."""
    text = checkpoint.metadata.get(ADAPTER_METADATA)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise AdapterError(
            f"its metadata '{ADAPTER_METADATA}' is no JSON object",
            file=checkpoint.origin,
            remedy=_RESAVE,
        )
    path = checkpoint.files[0] if checkpoint.files else Path(checkpoint.origin)
    split: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component = component_of(key) if "." in key else None
        entry = key.removeprefix(f"{component}.") if component else key
        split.setdefault(component or "", {})[entry] = value
    found = {name: AdapterConfig("LORA", entries, path) for name, entries in split.items()}
    alone = found.get("")  # of one model saved without its pipeline: holds for every path
    if alone is None:
        return found
    return {**{component_of(name) or "": alone for name in _modules(checkpoint)}, **found}


def _modules(checkpoint: Checkpoint) -> set[str]:
    return {split[0] for name in checkpoint.tensors if (split := split_lora_key(name))}


def _check_agreement(scales: _Scales, contents: Contents, origin: str, style: LoraStyle) -> None:
    """Refuse scales that programs would read differently."""
    if not scales.alphas or style != "diffusers":
        return
    key = next(iter(scales.alphas.values()))[1]
    without = next((name for name in contents.parameters if name not in scales.alphas), None)
    if scales.configs:
        problem, found = "has both alpha tensors and a config in its metadata", ADAPTER_METADATA
    elif without is not None:
        problem, found = "some modules have an alpha and others do not", without
    else:
        return
    error = AdapterError(
        problem,
        file=origin,
        tensor=key,
        found=found,
        remedy="Programs disagree about its scale; save it again with the one that trained it.",
    )
    contents.problems.setdefault(problem, error)


def _unknown(origin: str, name: str, style: LoraStyle, unsupported: str | None) -> AdapterError:
    if unsupported is not None:
        return AdapterError(
            f"holds {unsupported}, which is no product of two factors",
            file=origin,
            tensor=name,
            remedy="Merge it into its base with the program that trained it, and merge the full "
            "models.",
        )
    return AdapterError(
        f"is no tensor of a LoRA adapter in {style}'s format",
        file=origin,
        tensor=name,
        expected="lora_down, lora_up and alpha" if style == "kohya" else "lora_A and lora_B",
        remedy="Save each adapter into a file of its own.",
    )


def _broken(origin: str, info: TensorInfo, problem: str, expected: object) -> AdapterError:
    if not isinstance(expected, str):
        expected = f"{getattr(expected, 'name', expected)} alone"
    return malformed(origin, info, problem, expected, f"{info.name} {list(info.shape)}", _RESAVE)
