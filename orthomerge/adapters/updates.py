"""What an adapter of any kind does to its base: which weights it changes, which it replaces.

Resolved from headers; the changes themselves are computed one tensor at a time, when asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from orthomerge.adapters.keys import NOT_IN_BASE, base_tensor_name
from orthomerge.adapters.lora_updates import lora_updates
from orthomerge.adapters.rotation_updates import rotation_updates
from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.dtypes import FLOAT_DTYPES
from orthomerge.checkpoints.folder import tied_alias
from orthomerge.errors import AdapterError, OrthoMergeError, combined

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["AdapterUpdates", "WeightUpdate", "adapter_updates"]


class WeightUpdate(Protocol):
    """The change that an adapter makes to one tensor of its base."""

    @property
    def kind(self) -> str:
        """Kind of the adapter: "lora", "oft", "boft" or "hra"."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Tensors of the adapter it reads."""

    @property
    def read_bytes(self) -> int:
        """Their size."""

    @property
    def needs_base(self) -> bool:
        """Whether ``delta`` needs the base tensor; LoRA without DoRA does not."""

    def delta(
        self, W0: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the change of the base tensor, in its shape, never rounded below ``dtype``.

        Args:
            W0: The base tensor in ``dtype``; may be None unless ``needs_base``.
            shape: Its shape.
            dtype: float32 or float64.
        """


@dataclass(frozen=True)
class AdapterUpdates:
    """Everything an adapter does to a base.

    Attributes:
        updates: Base tensor name -> its change.
        replacements: Tensor name -> name in the adapter, of whole tensors (``modules_to_save``,
            trained biases). The name is the base's, or the adapter's own where the base has none.
    """

    updates: dict[str, WeightUpdate]
    replacements: dict[str, str]


def adapter_updates(
    source: Source,
    base_tensors: Mapping[str, TensorInfo],
    *,
    tied: bool = False,
    dropped: Collection[str] = (),
) -> AdapterUpdates:
    """Find the tensors of a base that an adapter changes, and check that they fit.

    Args:
        source: The adapter.
        base_tensors: Headers of the base.
        tied: The base ties its embedding to its output head, see ``checkpoints.folder.is_tied``.
        dropped: Whole tensors of the adapter that will not be used, so that they need not fit.

    Raises:
        AdapterError: Its kind is not supported, a module or shape is not in the base, ...
        ProblemsError: Several of these.
    """
    adapter = source.lora or source.rotations
    if adapter is None:
        raise AdapterError(
            f"{source.kind} adapters are not supported",
            file=source.origin,
            expected="LoRA, OFT, BOFT or HRA",
            remedy="Merge it into its base with PEFT, and merge the full models.",
        )
    problems: list[OrthoMergeError] = []
    found: list[tuple[str, WeightUpdate]] = []
    if source.lora is not None:
        found += lora_updates(source.lora, base_tensors, problems)
    elif source.rotations is not None:
        found += rotation_updates(source.rotations, base_tensors, problems)
    if not found and all(problem.problem == NOT_IN_BASE for problem in problems):
        problems = [_foreign_base(source, next(iter(adapter.modules)), len(problems))]
    updates: dict[str, WeightUpdate] = {}
    for name, update in found:
        problems += _update_problems(source, name, update, updates, base_tensors[name])
        updates[name] = update
    replacements = _replacements(source, adapter.others, base_tensors, updates, dropped, problems)
    if tied:
        problems += _tied_problems(source, base_tensors, {**updates, **replacements})
    if problems:
        raise combined(problems)
    return AdapterUpdates(updates, replacements)


def _update_problems(
    source: Source,
    name: str,
    update: WeightUpdate,
    updates: Mapping[str, WeightUpdate],
    info: TensorInfo,
) -> list[AdapterError]:
    problems = []
    if name in updates:
        problems.append(
            AdapterError(
                "two modules of the adapter change this one tensor of the base",
                file=source.origin,
                tensor=name,
                found=f"{updates[name].keys[0]} and {update.keys[0]}",
                remedy="Give the base model that the adapter was trained on.",
            )
        )
    if info.dtype not in FLOAT_DTYPES:
        problems.append(
            AdapterError(
                "the adapter changes a tensor of the base that is not floating-point",
                file=source.origin,
                tensor=name,
                found=info.dtype,
                remedy="Dequantise the base first.",
            )
        )
    return problems


def _replacements(
    source: Source,
    others: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    updates: Mapping[str, WeightUpdate],
    dropped: Collection[str],
    problems: list[OrthoMergeError],
) -> dict[str, str]:
    replaced: dict[str, str] = {}
    for own, key in others.items():
        try:
            name = base_tensor_name(own, base)
        except AdapterError:
            name = own  # a new head, say
        stored = source.checkpoint.tensors[key]
        misfit = name in base and base[name].shape != stored.shape
        if misfit and own not in dropped:
            problem = "the adapter replaces this tensor by one of another shape"
        elif name in updates:
            problem = "the adapter both changes this tensor and replaces it"
        elif name in replaced:
            problem = "two tensors of the adapter replace this one"
        else:
            replaced[name] = key
            continue
        problems.append(
            AdapterError(
                problem,
                file=source.origin,
                tensor=name,
                expected=list(base[name].shape) if name in base else None,
                found=f"{key} {list(stored.shape)}",
                remedy="Give the base model that the adapter was trained on.",
            )
        )
    return replaced


def _tied_problems(
    source: Source, base: Mapping[str, TensorInfo], changed: Mapping[str, object]
) -> list[AdapterError]:
    """Refuse to change one of two tensors that the base ties: the other must not change."""
    adapter = source.lora or source.rotations
    modules = adapter.modules.values() if adapter else ()
    embeddings = {f"{module.name}.weight" for module in modules if module.kind == "embedding"}
    pair = tied_alias({*base, *changed}) or ()
    return [
        AdapterError(
            "the adapter changes a tensor that this base ties: embedding and output head are one",
            file=source.origin,
            tensor=name,
            remedy="Untie the base: save it with tie_word_embeddings false.",
        )
        for name in changed
        if name in pair or name in embeddings
    ]


def _foreign_base(source: Source, module: str, count: int) -> AdapterError:
    flat = source.lora is not None and source.lora.style == "kohya"
    like = f"a module like '{module}' with dots for underscores"
    return AdapterError(
        f"none of the {count} modules that the adapter changes is in the base model",
        file=source.origin,
        expected=like if flat else f"a tensor like '{module}.weight'",
        remedy="Give the base that it was trained on. If it is that one, transformers saved it "
        "under other names: save it with save_pretrained(..., save_original_format=False).",
    )
