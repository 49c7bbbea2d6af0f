"""Check that LoRA adapters belong together, and that their modules can be one adapter.

From configs and headers; whether they fit a base is checked against its tensors in ``views``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from orthomerge.adapters.lora import LoraAdapter
from orthomerge.errors import AdapterError, OrthoMergeError, RecipeError
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.plan import MergeRequest

__all__ = ["absent_problems", "agreement_problems", "base_problems", "module_problems"]


def base_problems(request: MergeRequest, adapters: Sequence[LoraAdapter]) -> list[OrthoMergeError]:
    """Return why these adapters are not of one base model, by the names that they give it."""
    bases = {a.origin: a.config.values.get("base_model_name_or_path") for a in adapters}
    names = {
        PurePosixPath(str(base).rstrip("/")).name.casefold() for base in bases.values() if base
    }
    if len(names) > 1 and not request.assume_same_base:
        return [
            AdapterError(
                "the adapters name different base models",
                found=", ".join(f"{base} ({origin})" for origin, base in bases.items()),
                remedy="Merge adapters of one base. If these are one model under several names, "
                "pass --assume-same-base.",
            )
        ]
    return []


def agreement_problems(
    request: MergeRequest, adapters: Sequence[LoraAdapter]
) -> list[OrthoMergeError]:
    """Return why these adapters are not of one base model and one format."""
    problems = base_problems(request, adapters)
    styles = {adapter.style: adapter.origin for adapter in adapters}
    if len(styles) > 1:
        problems.append(
            AdapterError(
                "the adapters are of different formats, which name modules differently",
                found=", ".join(f"{style} ({origin})" for style, origin in styles.items()),
                remedy="Bring them to one format first: orthomerge merge ONE --method passthrough "
                "--style diffusers -o OUT.safetensors.",
            )
        )
    flags = {adapter.config.value("fan_in_fan_out", bool, False) for adapter in adapters}
    if len(flags) > 1:
        problems.append(
            AdapterError(
                "the adapters' fan_in_fan_out differ, so their bases store weights differently",
                remedy="Merge adapters of one base model.",
            )
        )
    return problems


def module_problems(
    request: MergeRequest,
    modules: Mapping[str, JoinedLora],
    adapters: Sequence[LoraAdapter],
    *,
    has_base: bool,
) -> list[OrthoMergeError]:
    """Return why these modules cannot be merged into an adapter of the form asked for."""
    problems: list[OrthoMergeError] = []
    dora = next((module for module in modules.values() if module.dora), None)
    if dora is not None and request.form != "dora":
        base = (
            "" if has_base else "Pass --base (in a recipe: base), the model they were trained on. "
        )
        problems.append(
            AdapterError(
                "DoRA scales the rows of the base's weights, which no low-rank change can express",
                file=", ".join(a.origin for a in adapters if a.dora),
                tensor=dora.name,
                remedy=f"{base}With --base the result is a full checkpoint, with --as dora as "
                "well a DoRA adapter.",
            )
        )
    biased = next((module for module in modules.values() if module.biased), None)
    if biased is not None and request.form == "dora":
        problems.append(
            AdapterError(
                "PEFT has no biases of B beside magnitudes",
                tensor=biased.name,
                remedy="Pass --as full.",
            )
        )
    problems += absent_problems(request, modules)
    return problems


def absent_problems(
    request: MergeRequest, modules: Mapping[str, JoinedLora]
) -> list[OrthoMergeError]:
    """Return that some modules are not in every adapter, if that is to be refused."""
    absent = [name for name, module in modules.items() if None in module.parts]
    if not absent or request.absent != "error":
        return []
    return [
        RecipeError(
            f"{len(absent)} of {len(modules)} modules are not in every adapter",
            tensor=absent[0],
            remedy="Pass --absent zero or skip.",
        )
    ]
