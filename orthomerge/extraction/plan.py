"""Decide from headers what an extraction will do, and report all that is wrong at once.

Which weights are linear layers is read off names and shapes: no model class is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from orthomerge.adapters.sizes import adjusted_divisor
from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.dtypes import FLOAT_DTYPES
from orthomerge.checkpoints.folder import is_tied, read_config, tied_alias
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.errors import (
    AdapterError,
    BudgetError,
    OrthoMergeError,
    RecipeError,
    TensorMismatchError,
    combined,
)
from orthomerge.extraction.settings import ExtractSettings

__all__ = ["ExtractionPlan", "Layer", "plan_extraction"]

_WEIGHT = ".weight"
_EMBEDDINGS = {"wte", "wpe", "shared", "tok_embeddings", "word_embeddings"}
# Models whose Conv1D layers store their weights as [in, out].
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight to explain.

    Attributes:
        name: Tensor name.
        rows: Output features o.
        columns: Input features n.
        block_size: Of its rotation; 0 without one.
        transposed: The file holds [n, o].
    """

    name: str
    rows: int
    columns: int
    block_size: int
    transposed: bool = False

    @property
    def module(self) -> str:
        """Module path, as PEFT writes it."""
        return self.name.removesuffix(_WEIGHT)


@dataclass(frozen=True)
class ExtractionPlan:
    """What will be done.

    Attributes:
        layers: The weights to explain, in file order.
        others: All other names of either checkpoint, which are only compared.
        modules: All module paths of the base.
        peak_bytes: Working memory, beside Python and torch: the largest layer's matrices and
            all factors, which are held until the end.
        notes: What the caller should know.
    """

    layers: tuple[Layer, ...]
    others: tuple[str, ...]
    modules: frozenset[str]
    peak_bytes: int
    notes: tuple[str, ...] = ()


def plan_extraction(
    model: Source,
    base: Source,
    settings: ExtractSettings,
    *,
    memory_budget_bytes: int | None = None,
) -> ExtractionPlan:
    """Match two checkpoints' linear weights.

    Raises:
        OrthoMergeError: One problem, or ``ProblemsError`` with all of them.
    """
    problems = settings.problems()
    problems += [_not_full(source) for source in (model, base) if source.kind != "full"]
    if problems:
        raise combined(problems)
    old, new = base.checkpoint.tensors, model.checkpoint.tensors
    chosen = _chosen(old, settings.targets, problems)
    tied = tied_alias(old) if is_tied(read_config(base.checkpoint.folder)) else None
    layers: list[Layer] = []
    for name in chosen:
        if tied is not None and name == tied[0]:
            continue  # the head is the embedding: adapting it alone would untie them
        layer = _layer(base, old[name], new.get(name), settings, problems)
        if layer is not None:
            layers.append(layer)
    peak = _peak_bytes(layers, settings)
    if memory_budget_bytes is not None and peak > memory_budget_bytes:
        problems.append(
            BudgetError(
                "the extraction needs more working memory than the budget",
                expected=f"at most {memory_budget_bytes} bytes",
                found=f"{peak} bytes",
                remedy="Raise --memory-budget, or extract fewer layers at a time with --target.",
            )
        )
    if problems:
        raise combined(problems)
    taken = {layer.name for layer in layers}
    others = tuple(name for name in dict.fromkeys([*old, *new]) if name not in taken)
    modules = frozenset(name.rpartition(".")[0] for name in old)
    return ExtractionPlan(tuple(layers), others, modules, peak, _notes(layers, settings))


def _not_full(source: Source) -> AdapterError:
    return AdapterError(
        "only full checkpoints can be turned into adapters",
        file=source.origin,
        found=source.description,
        remedy="Merge the adapter into its base first: orthomerge merge ADAPTER --base BASE.",
    )


def _chosen(
    tensors: Mapping[str, TensorInfo], targets: tuple[str, ...], problems: list[OrthoMergeError]
) -> list[str]:
    """Return the linear weights, or those of them that a pattern names."""
    linear = [name for name, info in tensors.items() if _is_linear(info)]
    if not linear:
        problems.append(AdapterError("the base has no linear weights that could be adapted"))
    for pattern in targets if linear else ():
        if not any(_matches(name, pattern) for name in linear):
            problems.append(
                RecipeError(
                    f"no linear weight of the base matches '{pattern}'",
                    expected=f"a pattern for names like '{linear[0]}'",
                    remedy="Embeddings, norms and biases are no linear weights.",
                )
            )
    if not targets:
        return linear
    return [name for name in linear if any(_matches(name, pattern) for pattern in targets)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(_WEIGHT), pattern)


def _is_linear(info: TensorInfo) -> bool:
    if len(info.shape) != 2 or 0 in info.shape or info.dtype not in FLOAT_DTYPES:
        return False
    module, _, leaf = info.name.rpartition(".")
    last = module.rpartition(".")[2]
    return leaf == "weight" and bool(module) and "embed" not in last and last not in _EMBEDDINGS


def _layer(
    base: Source,
    info: TensorInfo,
    other: TensorInfo | None,
    settings: ExtractSettings,
    problems: list[OrthoMergeError],
) -> Layer | None:
    if other is None or other.shape != info.shape or other.dtype not in FLOAT_DTYPES:
        problems.append(
            TensorMismatchError(
                "the fine-tune has no weight like the base's",
                tensor=info.name,
                expected=f"{info.dtype} {list(info.shape)}",
                found=f"{other.dtype} {list(other.shape)}" if other else "nothing",
                remedy="Give the base it was fine-tuned from, or choose layers with --target.",
            )
        )
        return None
    transposed = _is_conv1d(base, info.name)
    if transposed and settings.rotates:
        problems.append(
            AdapterError(
                "PEFT's OFT cannot adapt Conv1D layers",
                tensor=info.name,
                remedy="Use --kind lora.",
            )
        )
        return None
    rows, columns = reversed(info.shape) if transposed else info.shape
    size = adjusted_divisor(columns, settings.block_size) if settings.rotates else 0
    if size == 1:
        problems.append(
            AdapterError(
                "its columns cannot be split into blocks near the size asked for",
                tensor=info.name,
                expected=f"a divisor of {columns} near {settings.block_size}",
                remedy="Choose another --block-size, or leave this layer out with --target.",
            )
        )
        return None
    return Layer(info.name, rows, columns, size, transposed)


def _is_conv1d(base: Source, name: str) -> bool:
    config = read_config(base.checkpoint.folder) or {}
    layer = name.removesuffix(_WEIGHT).rpartition(".")[2]
    return config.get("model_type") in _CONV1D_MODELS and layer in _CONV1D_LAYERS


def _peak_bytes(layers: list[Layer], settings: ExtractSettings) -> int:
    """Bound the memory: six matrices of the largest layer, its sketch or its SVD, all factors."""
    largest = kept = 0
    for layer in layers:
        o, n = layer.rows, layer.columns
        rank = min(o, n, settings.rank or min(o, n)) if settings.low_rank else 0
        exact = min(o, n) <= max(256, 2 * (rank + 16))
        svd = 8 * (3 * o * n if exact else 6 * (o + n) * (rank + 16)) if settings.low_rank else 0
        blocks = 8 * 6 * n * layer.block_size
        largest = max(largest, 4 * 6 * o * n + svd + blocks)
        kept += 4 * (rank * (o + n) + n * layer.block_size // 2)
    return largest + kept


def _notes(layers: list[Layer], settings: ExtractSettings) -> tuple[str, ...]:
    moved = sorted({(v.columns, v.block_size) for v in layers} - {(0, 0)}, reverse=True)
    return tuple(
        f"blocks of {size} for layers of {columns} columns, which {settings.block_size} "
        "does not divide"
        for columns, size in moved
        if settings.rotates and size != settings.block_size
    )
