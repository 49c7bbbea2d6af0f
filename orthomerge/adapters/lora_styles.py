"""How LoRA tensors are named: by PEFT, by kohya's sd-scripts, by diffusers in several spellings.

Names only: which style a file has, and which module and part a name means. Kohya flattens module
paths (``lora_unet_down_blocks_0_…``), which loses the dots; the others keep them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from orthomerge.adapters.keys import PREFIX
from orthomerge.errors import AdapterError

__all__ = [
    "ADAPTER_METADATA",
    "COMPONENTS",
    "LoraPart",
    "LoraStyle",
    "component_of",
    "file_style",
    "split_lora_key",
    "unsupported_part",
]

LoraStyle = Literal["peft", "kohya", "diffusers"]
_STYLES: tuple[LoraStyle, ...] = ("peft", "kohya", "diffusers")
LoraPart = Literal["A", "B", "alpha", "magnitude", "bias"]

#: The entry of ``__metadata__`` in which diffusers keeps PEFT's config.
ADAPTER_METADATA = "lora_adapter_metadata"
#: Parts of a pipeline that diffusers (the last one: ComfyUI) puts before module paths.
COMPONENTS = (
    "unet",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "transformer",
    "transformer_2",
    "prior",
    "decoder",
    "controlnet",
    "diffusion_model",
)
# Where a module path begins that was saved without its component.
_BEGINNINGS = {
    "down_blocks": "unet",
    "mid_block": "unet",
    "up_blocks": "unet",
    "conv_in": "unet",
    "conv_out": "unet",
    "time_embedding": "unet",
    "add_embedding": "unet",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
}
_SPELLINGS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<module>.+)\.lora_(?P<part>A|B|down|up)\.weight",
        r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<part>down|up)\.weight",
        r"(?P<module>.+_lora)\.(?P<part>down|up)\.weight",
        r"(?P<module>.+)\.lora_B\.(?P<part>bias)",
        r"(?P<module>.+)\.lora_(?P<part>magnitude)_vector(?:\.weight)?",
        r"(?P<module>.+)\.(?P<part>alpha)",
    )
)
_PARTS: dict[str, LoraPart] = {
    "A": "A",
    "B": "B",
    "down": "A",
    "up": "B",
    "bias": "bias",
    "magnitude": "magnitude",
    "alpha": "alpha",
}
# The attention layers of old processors, as the models' own modules are called.
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_KOHYA_MODULE = re.compile(r"(?:lora|lycoris)_[^.]+")
_UNSUPPORTED = (
    (re.compile(r"\.lora_mid\."), "LoCon with CP decomposition (lora_mid)"),
    (re.compile(r"\.hada_"), "LoHa (hada_)"),
    (re.compile(r"\.lokr_"), "LoKr (lokr_)"),
    (re.compile(r"\.dora_scale$"), "DoRA in LyCORIS's form (dora_scale)"),
    (re.compile(r"\.oft_(?:blocks|diag)$"), "OFT in kohya's form"),
    (re.compile(r"\.(?:diff|diff_b|w_norm|b_norm)$"), "a dense difference of a weight"),
)


def split_lora_key(key: str) -> tuple[str, LoraPart] | None:
    """Return the module path and the part that a name of any style but PEFT's means.

    Old spellings come out as today's: processors' layers under the attention itself, and a path
    that lacks its component with it. None where the name is not one of a LoRA tensor.

    >>> split_lora_key("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight")
    ('lora_te1_text_model_encoder_layers_0_mlp_fc1', 'A')
    >>> split_lora_key("mid_block.attentions.0.attn1.processor.to_out_lora.up.weight")
    ('unet.mid_block.attentions.0.attn1.to_out.0', 'B')
    """
    match = next((found for one in _SPELLINGS if (found := one.fullmatch(key))), None)
    if match is None:
        return None
    module = match["module"]
    if not _KOHYA_MODULE.fullmatch(module):
        module = _present_path(module)
    return module, _PARTS[match["part"]]


def unsupported_part(key: str) -> str | None:
    """Return what a tensor belongs to that other programs know and that cannot be read here.

    >>> unsupported_part("lora_unet_conv_in.lora_mid.weight")
    'LoCon with CP decomposition (lora_mid)'
    """
    return next((meaning for pattern, meaning in _UNSUPPORTED if pattern.search(key)), None)


def component_of(module: str) -> str | None:
    """Return the part of a pipeline that a dotted module path begins with.

    >>> component_of("text_encoder_2.text_model.final"), component_of("layers.0.q")
    ('text_encoder_2', None)
    """
    first = module.partition(".")[0]
    return first if first in COMPONENTS else None


def file_style(
    names: Collection[str], metadata: Collection[str] = (), *, file: str | None = None
) -> LoraStyle | None:
    """Return the style of a LoRA file, or None where no name is one of a LoRA tensor.

    ``lora_A`` without PEFT's prefix is diffusers' where a component of a pipeline stands before it
    or the metadata is diffusers'; elsewhere nothing says what its scale is, as in PEFT's own files
    without their config, so it counts as PEFT's.

    Args:
        names: All tensor names.
        metadata: Keys of the file's metadata.
        file: For messages.

    Raises:
        AdapterError: Names of several styles are in it.

    >>> file_style(["lora_unet_x.lora_up.weight", "lora_unet_x.alpha"])
    'kohya'
    >>> file_style(["model.layers.0.q_proj.lora_A.weight"])
    'peft'
    """
    found: dict[str, str] = {}
    for name in names:
        style = _key_style(name)
        if style is not None:
            found.setdefault(style, name)
    if "bare" in found:
        joins = "diffusers" in found or ADAPTER_METADATA in metadata
        found.setdefault("diffusers" if joins else "peft", found.pop("bare"))
        found.pop("bare", None)
    if len(found) > 1:
        listed = ", ".join(f"{style}: {name}" for style, name in sorted(found.items()))
        raise AdapterError(
            "mixes names of several LoRA formats",
            file=file,
            tensor=list(found.values())[1],
            found=listed,
            remedy="Save each adapter into a file of its own.",
        )
    return next((style for style in _STYLES if style in found), None)


def _key_style(name: str) -> LoraStyle | Literal["bare"] | None:
    if "lora" not in name and not name.startswith("lycoris_"):
        return None  # quickly, for the many names of a full model
    if name.startswith(PREFIX):
        return "peft" if ".lora_" in name else None
    split = split_lora_key(name)
    module = name.partition(".")[0]
    if _KOHYA_MODULE.fullmatch(module):
        known = split is not None and split[1] in ("A", "B")
        return "kohya" if known or unsupported_part(name) else None
    if split is None or split[1] == "alpha":
        return None
    named_as_peft = re.search(r"\.lora_(?:A|B|magnitude_vector)(?:\.|$)", name)
    return "bare" if named_as_peft and component_of(split[0]) is None else "diffusers"


def _present_path(module: str) -> str:
    """Return a dotted path as today's diffusers writes it."""
    parent, _, layer = module.replace(".processor.", ".").rpartition(".")
    if layer.endswith("_lora"):
        layer = layer.removesuffix("_lora")
        renamed = _OLD_TEXT if parent.startswith("text_encoder") else _OLD_UNET
        layer = renamed.get(layer, layer)
    path = f"{parent}.{layer}" if parent else layer
    component = _BEGINNINGS.get(path.partition(".")[0])
    return path if component is None else f"{component}.{path}"
