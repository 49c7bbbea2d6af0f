"""Module names of one LoRA style in another, and kohya's flattened names in a base model.

Names only. Flattening turns every dot into an underscore, so the way back needs the base's names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from orthomerge.adapters.keys import NOT_IN_BASE
from orthomerge.adapters.lora_styles import LoraStyle, component_of
from orthomerge.errors import AdapterError

__all__ = ["FlattenedNames", "converted_module"]

_PREFIX = re.compile(r"(?P<prefix>lora_(?:unet|transformer|te\d?|prior_unet)|lycoris)_")
# Kohya's prefix -> what stands before the paths of that part in whole pipelines.
_HOMES = {
    "unet": ("unet", "transformer", "model.diffusion_model", "diffusion_model"),
    "te1": ("text_encoder", "cond_stage_model", "conditioner.embedders.0", "text_encoders.clip_l"),
    "te2": ("text_encoder_2", "conditioner.embedders.1", "text_encoders.clip_g"),
    "te3": ("text_encoder_3", "text_encoders.t5xxl"),
}
_FAMILIES = {"unet": "unet", "transformer": "unet", "te": "te1"}
_KOHYA_PREFIXES = {
    "unet": "lora_unet",
    "diffusion_model": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}


class FlattenedNames:
    """The modules of a base model, found by the names that kohya makes of them.

    A name fits a module whose path, or whose path from some dot on, is the name without its prefix
    once its dots are underscores. The whole path comes first.

    Args:
        modules: Paths of the base model's modules.

    >>> names = FlattenedNames(["down_blocks.0.to_q", "mid_block.to_q"])
    >>> names.path("lora_unet_down_blocks_0_to_q")
    'down_blocks.0.to_q'
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._whole: dict[str, set[str]] = {}
        self._ends: dict[str, set[str]] = {}
        for path in modules:
            parts = path.split(".")
            self._whole.setdefault("_".join(parts), set()).add(path)
            for start in range(1, len(parts)):
                self._ends.setdefault("_".join(parts[start:]), set()).add(path)

    def path(self, module: str) -> str:
        """Return the path of the one module that a flattened name fits.

        Raises:
            AdapterError: No module fits, or several do.
        """
        match = _PREFIX.match(module)
        stem = module[match.end() :] if match else module
        family = _family(match["prefix"]) if match else None
        for known in (self._whole, self._ends):
            found = sorted(path for path in known.get(stem, ()) if _may_be(path, family))
            if len(found) == 1:
                return found[0]
            if found:
                raise AdapterError(
                    "fits several modules of the base model once their dots are underscores",
                    tensor=module,
                    found=", ".join(found[:4]),
                    remedy="Give the part of the pipeline alone that the adapter was trained on.",
                )
        raise AdapterError(
            NOT_IN_BASE,
            tensor=module,
            expected=f"a module whose path is '{stem}' with dots for some of its underscores",
            remedy="Give the base model that the adapter was trained on, named as the program "
            "that trained it names its modules.",
        )


def converted_module(
    module: str,
    source: LoraStyle,
    target: LoraStyle,
    *,
    component: str | None = None,
    encoders: int = 1,
    base_modules: Collection[str] = (),
) -> str:
    """Return a module's name in another style.

    ============ =============================================================
    from, to
    ============ =============================================================
    peft, diff.  the component is put before the path
    diff., peft  the component is taken off: a PEFT adapter is of one model
    any, kohya   the path is flattened behind kohya's prefix for its component
    kohya, any   only with the base's module names, which have the dots
    ============ =============================================================

    Args:
        module: Name as the source style writes it.
        source: Style of the name.
        target: Style wanted.
        component: Part of the pipeline, e.g. ``"unet"``; needed where the name does not say it.
        encoders: Text encoders of the pipeline: kohya numbers them where there are several.
        base_modules: Paths of the base model's modules, for names of kohya's.

    Raises:
        AdapterError: Something that is needed is missing or contradicts the name.

    >>> converted_module("mid_block.to_q", "peft", "diffusers", component="unet")
    'unet.mid_block.to_q'
    >>> converted_module("text_encoder.layers.0.q_proj", "diffusers", "kohya", encoders=2)
    'lora_te1_layers_0_q_proj'
    """
    if source == target:
        return module
    own, path = _parted(module, source, base_modules)
    if own is not None and component is not None and own != component:
        raise AdapterError(
            f"belongs to another component than '{component}'",
            tensor=module,
            found=own,
            remedy="Convert each component on its own.",
        )
    home = own or component
    if target == "peft":
        return path
    if home is None:
        raise AdapterError(
            f"{target}'s names say which part of a pipeline a module belongs to, and this does not",
            tensor=module,
            remedy="Name it, e.g. unet, transformer or text_encoder: --set output.component=unet "
            "(in a recipe: output.component).",
        )
    return f"{home}.{path}" if target == "diffusers" else _flattened(home, path, encoders)


def _parted(
    module: str, source: LoraStyle, base_modules: Collection[str]
) -> tuple[str | None, str]:
    """Return a name's component, where it says one, and the path in it."""
    if source == "kohya":
        if not base_modules:
            raise AdapterError(
                "kohya's names have lost their dots, so they cannot be written in another format",
                tensor=module,
                remedy="Pass --as lora and the base model, whose names have them, with --base, or "
                "write kohya's format.",
            )
        module = FlattenedNames(base_modules).path(module)
    component = None if source == "peft" else component_of(module)
    return component, module.removeprefix(f"{component}.") if component else module


def _flattened(component: str, path: str, encoders: int) -> str:
    prefix = _KOHYA_PREFIXES.get(component)
    if prefix is None:
        raise AdapterError(
            f"kohya's format has no prefix for the component '{component}'",
            tensor=path,
            expected=", ".join(_KOHYA_PREFIXES),
            remedy="Write diffusers' format.",
        )
    if prefix == "lora_te" and encoders > 1:
        prefix = "lora_te1"
    return f"{prefix}_{path.replace('.', '_')}"


def _family(prefix: str) -> str | None:
    part = prefix.partition("_")[2]
    family = _FAMILIES.get(part, part)
    return family if family in _HOMES else None


def _may_be(path: str, family: str | None) -> bool:
    """Return whether a path is not known to be in another part of a pipeline."""
    homes = {
        name
        for name, beginnings in _HOMES.items()
        if any(path.startswith(f"{beginning}.") for beginning in beginnings)
    }
    return family is None or not homes or family in homes
