"""The way out: stored numbers and the config of a merged OFT adapter that PEFT loads.

Decides what is written, not how: tensors go through the checkpoint writer, under ``oft_key``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthomerge.adapters.convention import Kind, OftConvention, canonical_sign
from orthomerge.adapters.rotated import RotationAdapter
from orthomerge.adapters.sizes import common_setting
from orthomerge.adapters.targets import exact_targets, matched_modules
from orthomerge.errors import AdapterError

if TYPE_CHECKING:
    import torch

__all__ = [
    "MergedModule",
    "common_convention",
    "merged_oft_config",
    "oft_config",
    "stored_from_canonical",
]

# The version that introduced what is written: the config's meaning, not the installed package.
_VERSION, _EMBEDDING_VERSION = "0.18.0", "0.19.0"
# Settings that say the same of every merged adapter.
_FIXED = {
    "peft_type": "OFT",
    "coft": False,
    "eps": 6e-5,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "module_dropout": 0.0,
}
_BIAS_STRENGTH = ("none", "oft_only", "all")


@dataclass(frozen=True, slots=True)
class MergedModule:
    """How a module of the merged adapter is stored.

    Attributes:
        in_features: Size n of the dense rotation: the weight's columns.
        block_size: Size b of its blocks.
        kind: "linear" (convolutions too) or "embedding".
        shared: One stored block stands for all n/b.
    """

    in_features: int
    block_size: int
    kind: Kind = "linear"
    shared: bool = False


def common_convention(
    adapters: Sequence[RotationAdapter], *, legacy: bool = False
) -> OftConvention | None:
    """Return the convention all adapters share, if PEFT >= 0.18 can express it.

    None when they disagree, and, unless ``legacy`` is allowed, when they use the series of PEFT
    0.16 and 0.17, which later versions would evaluate differently. Three and four terms are the
    same series.
    """
    found = {
        OftConvention(True, 4) if one == OftConvention(True, 3) else one
        for one in (adapter.convention for adapter in adapters)
    }
    convention = found.pop() if len(found) == 1 else None
    return None if convention is None or (convention.legacy and not legacy) else convention


def stored_from_canonical(A: torch.Tensor, kind: Kind, convention: OftConvention) -> torch.Tensor:
    """Return what PEFT stores for canonical skew blocks, the inverse of ``OftAdapter.skew``.

    A [nb, b, b] -> [nb, b(b-1)/2].

    Args:
        A: Canonical skew blocks.
        kind: Of the module.
        convention: Of the adapter that is written; not legacy.

    Raises:
        AdapterError: The convention is legacy, which no current PEFT evaluates.

    >>> import torch
    >>> A = torch.tensor([[[0.0, 2.0], [-2.0, 0.0]]])
    >>> stored_from_canonical(A, "linear", OftConvention(cayley_neumann=True))
    tensor([[-2.]])
    """
    from orthomerge.linalg import pack_skew

    _refuse_legacy(convention)
    return canonical_sign(kind, convention) * pack_skew(A)


def merged_oft_config(
    adapters: Sequence[RotationAdapter],
    convention: OftConvention,
    modules: Mapping[str, MergedModule],
    base_modules: Collection[str] = (),
) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of a merged adapter, for PEFT 0.18 and later.

    PEFT rebuilds every layer from this file before it loads a tensor, so the one block size in it
    must give each module its own, and its target list must match the merged modules only.

    Args:
        adapters: The merged adapters, in order; the first names the base model.
        convention: How the merged numbers are stored.
        modules: What is stored, by module path.
        base_modules: Paths of the base model's modules, where known: a target that also names
            another module is then written as a regular expression.

    Returns:
        The config. ``modules_to_save`` is the union of the adapters': PEFT refuses to load when
        the tensors of one are missing, so all their ``others`` must be written, too.

    Raises:
        AdapterError: No single setting gives all modules their block size, only some modules are
            shared, the convention is legacy, or a module is both rotated and saved whole.
    """
    _refuse_legacy(convention)
    saved = sorted({name for one in adapters for name in one.config.names("modules_to_save")})
    _refuse_saved_targets(modules, saved)
    shared = {module.shared for module in modules.values()}
    if len(shared) > 1:
        raise AdapterError(
            "some modules share one block and others do not, which one PEFT config cannot say",
            remedy="Expand the shared blocks before writing, or write full weights.",
        )
    setting, value = common_setting(
        {(module.in_features, module.block_size) for module in modules.values()}
    )
    embeds = any(module.kind == "embedding" for module in modules.values())
    first = adapters[0].config.values
    biases = [_bias(one) for one in adapters]
    return {
        **_FIXED,
        "auto_mapping": _agreed(adapters, "auto_mapping"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "bias": max(biases, key=_bias_strength),
        "block_share": shared == {True},
        "modules_to_save": saved or None,
        "num_cayley_neumann_terms": convention.terms,
        "oft_block_size": value if setting == "oft_block_size" else 0,
        "peft_version": _EMBEDDING_VERSION if embeds else _VERSION,
        "r": value if setting == "r" else 0,
        "revision": first.get("revision"),
        "target_modules": _targets(adapters, modules, base_modules),
        "task_type": _agreed(adapters, "task_type"),
        "use_cayley_neumann": convention.cayley_neumann,
    }


def oft_config(
    modules: Mapping[str, MergedModule],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    base_modules: Collection[str] = (),
) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of an OFT adapter with the exact Cayley map.

    Args:
        modules: What is stored, by module path; linear layers, no shared blocks.
        base_model: Name or path of the base model.
        task_type: PEFT's, e.g. ``"CAUSAL_LM"``.
        base_modules: Paths of the base model's modules; see ``merged_oft_config``.

    Raises:
        AdapterError: No single setting gives all modules their block size.
    """
    setting, value = common_setting(
        {(module.in_features, module.block_size) for module in modules.values()}
    )
    return {
        **_FIXED,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "block_share": False,
        "modules_to_save": None,
        "num_cayley_neumann_terms": 5,
        "oft_block_size": value if setting == "oft_block_size" else 0,
        "peft_version": _VERSION,
        "r": value if setting == "r" else 0,
        "revision": None,
        "target_modules": exact_targets(modules, base_modules),
        "task_type": task_type,
        "use_cayley_neumann": False,
    }


def _targets(
    adapters: Sequence[RotationAdapter],
    modules: Mapping[str, MergedModule],
    base_modules: Collection[str],
) -> list[str] | str:
    """Return targets that match exactly ``modules``.

    A list matches the union of what its entries match, so plain lists join; anything narrowed by
    further settings, or a subset of the modules, is spelled out as full paths.
    """
    everything = {name for one in adapters for name in one.modules}
    if everything == set(modules) and all(_plain_targets(one) for one in adapters):
        names = sorted({name for one in adapters for name in one.config.names("target_modules")})
        # Another base may have more modules of these names than the adapters were trained on.
        if matched_modules(names, base_modules) <= set(modules):
            return names
    return exact_targets(modules, base_modules)


def _plain_targets(adapter: RotationAdapter) -> bool:
    values = adapter.config.values
    narrowed = any(
        values.get(key) not in (None, [], "")
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
    )
    return isinstance(values.get("target_modules"), list) and not narrowed


def _refuse_saved_targets(modules: Mapping[str, MergedModule], saved: Sequence[str]) -> None:
    for name in saved:
        for path in modules:
            if f".{name}." in f".{path}.":  # PEFT matches a saved module's path and all below it
                raise AdapterError(
                    f"is rotated by one adapter and saved whole ('{name}') by another",
                    tensor=path,
                    remedy="Merge to full weights instead of an adapter.",
                )


def _refuse_legacy(convention: OftConvention) -> None:
    if convention.legacy:
        raise AdapterError(
            "the Cayley-Neumann series of PEFT 0.16 and 0.17 cannot be written",
            remedy="Write the exact Cayley map, which every PEFT reads alike.",
        )


def _agreed(adapters: Sequence[RotationAdapter], key: str) -> Any:
    values = [one.config.values.get(key) for one in adapters]
    return values[0] if all(value == values[0] for value in values) else None


def _bias(adapter: RotationAdapter) -> str:
    bias = str(adapter.config.values.get("bias") or "none")
    return "oft_only" if bias.endswith("_only") else bias  # "boft_only" of BOFT, say


def _bias_strength(bias: str) -> int:
    return _BIAS_STRENGTH.index(bias) if bias in _BIAS_STRENGTH else 0
