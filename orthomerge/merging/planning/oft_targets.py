"""Check the modules of adapters that rotate: against the base, and against what can be written.

Headers only, but for the few numbers of the output scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orthomerge.adapters.hra import reflection_problem
from orthomerge.adapters.keys import base_weight_name
from orthomerge.adapters.rotated import RotationAdapter
from orthomerge.adapters.rotation_updates import rotation_misfit
from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.folder import is_tied, read_config
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import AdapterError, OrthoMergeError
from orthomerge.merging.oft_modules import JoinedModule
from orthomerge.merging.planning.draft import is_float

__all__ = ["adapter_problems", "generator_problems", "match_targets"]

_REMEDY = "Pass --base, to get a full checkpoint."


def generator_problems(adapters: Sequence[RotationAdapter]) -> list[OrthoMergeError]:
    """Return why adapters have no generators in the Lie algebra, once per adapter."""
    problems: list[OrthoMergeError] = []
    for adapter in adapters:
        found = (reflection_problem(adapter, name) for name in adapter.modules)
        problems += [problem for problem in found if problem][:1]
    return problems


def adapter_problems(
    adapters: Sequence[RotationAdapter], modules: Mapping[str, JoinedModule]
) -> list[OrthoMergeError]:
    """Return why the result cannot be written as an OFT adapter of today's layout."""
    left = [name for name, module in modules.items() if module.side == "left"]
    if left:
        return [
            AdapterError(
                "today's OFT adapters cannot rotate output features, as those before PEFT 0.14 do",
                tensor=left[0],
                remedy=_REMEDY,
            )
        ]
    for adapter in adapters:
        for name, module in adapter.modules.items():
            if module.scale_key is not None and _scales(adapter, name):
                return [
                    AdapterError(
                        "today's OFT adapters cannot scale output features, as this one does",
                        file=adapter.origin,
                        tensor=module.scale_key,
                        remedy=_REMEDY,
                    )
                ]
    return []


def _scales(adapter: RotationAdapter, name: str) -> bool:
    """Return whether a module's scale, which is read here, is anything but ones."""
    import torch

    s = adapter.source.read(adapter.modules[name].scale_key or "")
    return not bool((s == torch.ones_like(s)).all())


def match_targets(
    modules: dict[str, JoinedModule], base: Source, problems: list[OrthoMergeError]
) -> dict[str, JoinedModule]:
    """Return the modules by the name of their weight in the base.

    Args:
        modules: The joined modules, by module path.
        base: The base.
        problems: What is wrong is added here.
    """
    tensors = base.checkpoint.tensors
    targets: dict[str, JoinedModule] = {}
    unmatched: list[OrthoMergeError] = []
    for name, module in modules.items():
        try:
            weight = base_weight_name(name, tensors)
        except AdapterError as error:
            unmatched.append(error)
            continue
        targets[weight] = module
        problems += _tied_problems(module, base) + _width_problems(module, tensors[weight])
    if modules and len(unmatched) == len(modules):
        unmatched = [_foreign_names(next(iter(modules)), len(modules), base)]
    problems += unmatched
    return targets


def _foreign_names(module: str, count: int, base: Source) -> AdapterError:
    return AdapterError(
        f"none of the {count} modules that the adapters rotate is in the base model",
        file=base.origin,
        expected=f"a tensor like '{module}.weight'",
        found=f"'{next(iter(base.checkpoint.tensors), '')}', …",
        remedy="Give the base that they were trained on. If it is that one, transformers saved it "
        "under other names: save it with save_pretrained(..., save_original_format=False).",
    )


def _width_problems(module: JoinedModule, info: TensorInfo) -> list[OrthoMergeError]:
    if not is_float(info.dtype):
        return [
            AdapterError(
                "the adapters rotate a weight of the base that is not floating-point",
                tensor=info.name,
                found=info.dtype,
                remedy="Dequantise the base first.",
            )
        ]
    for part in module.parts:
        problem = rotation_misfit(part, info) if part else None
        if problem is not None:
            return [problem]
    return []


def _tied_problems(module: JoinedModule, base: Source) -> list[OrthoMergeError]:
    """Refuse to rotate an embedding that the output head shares: the head must not rotate."""
    if module.kind != "embedding" or not is_tied(read_config(base.checkpoint.folder)):
        return []
    return [
        AdapterError(
            "the adapters rotate an embedding that this base ties to its output head",
            tensor=module.name,
            remedy="Merge without --base and apply the adapter with PEFT, or untie the base.",
        )
    ]
