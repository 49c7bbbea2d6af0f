"""The names under which LoRA formats store factors, and PEFT stores whole tensors beside them.

Names only, on the way out; the way in is in ``lora_styles`` and ``keys``.
"""

from __future__ import annotations

from collections.abc import Collection

from orthomerge.adapters.keys import PREFIX
from orthomerge.adapters.lora import LoraKind
from orthomerge.adapters.lora_styles import LoraPart, LoraStyle, component_of
from orthomerge.errors import AdapterError

__all__ = ["check_module_name", "lora_key", "saved_key", "saved_modules"]

# The last part of a name, by format.
_LEAVES: dict[LoraStyle, dict[LoraPart, str]] = {
    "peft": {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "magnitude": "lora_magnitude_vector",
        "bias": "lora_B.bias",
    },
    "kohya": {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"},
    "diffusers": {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "magnitude": "lora_magnitude_vector",
        "bias": "lora_B.bias",
    },
}


def lora_key(
    module: str,
    factor: LoraPart,
    kind: LoraKind = "linear",
    *,
    style: LoraStyle = "peft",
) -> str:
    """Return the name under which a format stores a part of a module.

    Args:
        module: Module name as the format writes it, see ``converted_module``; without PEFT's
            prefix.
        factor: "A", "B", DoRA's "magnitude", the "bias" of B, or "alpha".
        kind: Of the module.
        style: The format.

    Raises:
        AdapterError: The format has no such part, kind or module name.

    >>> lora_key("encoder.query", "A")
    'base_model.model.encoder.query.lora_A.weight'
    >>> lora_key("embed", "B", "embedding")
    'base_model.model.embed.lora_embedding_B'
    >>> lora_key("lora_unet_mid_block_to_q", "B", style="kohya")
    'lora_unet_mid_block_to_q.lora_up.weight'
    """
    if style == "peft" and kind == "embedding" and factor in ("A", "B"):
        return f"{PREFIX}{module}.lora_embedding_{factor}"
    leaf = _LEAVES[style].get(factor)
    if leaf is None or (style != "peft" and kind == "embedding"):
        raise AdapterError(
            f"{style}'s format has no {kind if leaf else factor} in its LoRA files",
            tensor=module,
            remedy="Write a PEFT adapter, or full weights.",
        )
    check_module_name(module, style)
    return f"{PREFIX if style == 'peft' else ''}{module}.{leaf}"


def check_module_name(module: str, style: LoraStyle) -> None:
    """Refuse a module name that a format does not write.

    Raises:
        AdapterError: It is none.
    """
    flat = module.startswith("lora_") and "." not in module
    if (style == "kohya") != flat or (style == "diffusers" and component_of(module) is None):
        expected = {
            "peft": "a path in the model",
            "kohya": "a flattened path behind a prefix, like lora_unet_mid_block_to_q",
            "diffusers": "a path behind its component, like unet.mid_block.to_q",
        }
        raise AdapterError(
            f"is no module name of {style}'s format",
            tensor=module,
            expected=expected[style],
            remedy="Convert the names with converted_module; kohya's names need the base's.",
        )


def saved_key(name: str, adapted: Collection[str] = ()) -> str:
    """Return the name under which PEFT stores a whole tensor of the base model.

    Args:
        name: Its name in the base model.
        adapted: The modules with factors; their own tensors are one level deeper.

    >>> saved_key("score.weight", {"q"}), saved_key("q.bias", {"q"})
    ('base_model.model.score.weight', 'base_model.model.q.base_layer.bias')
    """
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in adapted else f"{PREFIX}{name}"


def saved_modules(
    names: Collection[str], adapted: Collection[str] = (), base_modules: Collection[str] = ()
) -> list[str]:
    """Return the ``modules_to_save`` for whole tensors of the base model.

    Single biases need no entry, only ``bias`` in ``lora_config``.

    Args:
        names: Names of the tensors in the base model.
        adapted: The modules with factors.
        base_modules: Paths of the base model's modules, where known.

    Raises:
        AdapterError: PEFT would save a further module, or one that is adapted, under this name.

    >>> saved_modules(["score.weight", "score.bias", "q.bias", "norm.bias"], {"q"})
    ['score']
    """
    found = sorted({module for name in names if (module := _saved_module(name, names, adapted))})
    for module in found:
        # PEFT compares the ends of paths, without regard to the dots.
        more = sorted(p for p in {*base_modules, *adapted} if p != module and p.endswith(module))
        if module in adapted or more:
            raise AdapterError(
                "is saved whole, and PEFT would save a further module under this name",
                tensor=module,
                found=module if module in adapted else more[0],
                remedy="Write full weights instead of an adapter.",
            )
    return found


def _saved_module(name: str, names: Collection[str], adapted: Collection[str]) -> str | None:
    module, _, leaf = name.rpartition(".")
    alone = leaf == "bias" and (module in adapted or f"{module}.weight" not in names)
    return None if alone else module
