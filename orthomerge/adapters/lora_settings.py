"""What a LoRA config says: the scale of each module, and what cannot be read as ``scale * B A``.

Read from the config alone; no tensor is looked at here.
"""

from __future__ import annotations

import math
import re

from orthomerge.adapters.config import AdapterConfig
from orthomerge.errors import AdapterError

__all__ = ["lora_alpha", "lora_problems", "lora_scale"]

# Initialisations that leave the base weight as it is, unlike PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA.
_SAFE_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Settings under which the weight is not W0 + scale * B A, and what they mean.
_VARIANTS = {
    "target_parameters": "it adapts single parameters (mixtures of experts)",
    "use_qalora": "QALoRA pools the layer's input",
    "alora_invocation_tokens": "aLoRA is active only behind certain tokens",
    "arrow_config": "Arrow routes each token to other adapters",
    "kasa_config": "KaSA changes the base weight",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "layer_replication": "it adapts a model with repeated layers",
    "trainable_token_indices": "it also trains single rows of the embedding",
}


def lora_alpha(config: AdapterConfig, module: str) -> float:
    """Return a module's alpha: the first pattern that matches, else ``lora_alpha``.

    A pattern is a regular expression that must match the module's path to its end, from its
    beginning or after a dot, as PEFT does it; pinned by ``test_scale_is_pefts``.

    Raises:
        AdapterError: A pattern or a value has the wrong type.

    >>> from pathlib import Path
    >>> values = {"lora_alpha": 16, "alpha_pattern": {"q": 4}}
    >>> config = AdapterConfig("LORA", values, Path("a.json"))
    >>> lora_alpha(config, "layers.0.q"), lora_alpha(config, "layers.0.kq")
    (4.0, 16.0)
    """
    default = config.value("lora_alpha", float, 8.0)
    patterns = config.values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _wrong_pattern(config, patterns)
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise _wrong_pattern(config, pattern) from error
        if matches:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _wrong_pattern(config, f"{pattern}: {value!r}")
            return float(value)
    return default


def lora_scale(config: AdapterConfig, module: str, rank: int) -> float:
    """Return the factor of B A: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

    Raises:
        AdapterError: A setting has the wrong type, or the scale is not finite.
    """
    alpha = lora_alpha(config, module)
    if not math.isfinite(alpha):
        raise AdapterError("lora_alpha is not finite", file=config.path, found=alpha)
    return alpha / (math.sqrt(rank) if config.value("use_rslora", bool, False) else rank)


def lora_problems(config: AdapterConfig) -> list[AdapterError]:
    """Return why a LoRA adapter is not a plain change of its base's weights."""
    problems = [
        AdapterError(
            f"{name} is set: {meaning}, so it is no fixed change of a weight",
            file=config.path,
            found=config.values[name],
            remedy="Merge it into its base with PEFT where PEFT can, and merge the full models.",
        )
        for name, meaning in _VARIANTS.items()
        if config.values.get(name) not in (None, False, [], {})
    ]
    init = config.values.get("init_lora_weights", True)
    if init not in _SAFE_INITS:
        problems.append(
            AdapterError(
                f"init_lora_weights '{init}' changed the base's weights before the training",
                file=config.path,
                remedy="Save it with PEFT's path_initial_model_for_weight_conversion, which makes "
                "it an adapter of the original base.",
            )
        )
    return problems


def _wrong_pattern(config: AdapterConfig, found: object) -> AdapterError:
    return AdapterError(
        "alpha_pattern must map regular expressions to numbers",
        file=config.path,
        found=found,
        remedy="Give the folder that PeftModel.save_pretrained wrote.",
    )
