"""Walk through two checkpoints one layer at a time and publish what explains their difference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.sources import Source, open_source, source_files
from orthomerge.checkpoints.bundle import Bundle, publish_bundle
from orthomerge.checkpoints.destination import check_destination
from orthomerge.checkpoints.folder import read_config
from orthomerge.checkpoints.provenance import PROVENANCE_NAME, provenance_json
from orthomerge.checkpoints.sources import CheckpointSource
from orthomerge.diagnostics.difference import TensorDifference, compare_tensor
from orthomerge.errors import AdapterError, NumericalError
from orthomerge.extraction.folders import Adapter, adapter_bundle, lora_adapter, oft_adapter
from orthomerge.extraction.layers import LayerFactors, LayerReport, explain
from orthomerge.extraction.plan import ExtractionPlan, Layer, plan_extraction
from orthomerge.extraction.settings import ExtractKind, ExtractSettings
from orthomerge.linalg.devices import require_device
from orthomerge.linalg.precision import working_dtype
from orthomerge.version import __version__

__all__ = ["ExtractResult", "extract"]


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction found.

    Attributes:
        settings: What was asked for.
        layers: One report per changed linear weight, worst explained first.
        unchanged: Linear weights that are equal in both models; no adapter has them.
        unexplained: Other tensors that differ (norms, biases, embeddings, ...); no adapter has
            them, so the adapters do not give these back.
        adapters: Tensors and config by kind, ``"oft"`` and ``"lora"``.
        output: The published folder; None for an extraction in memory.
        peak_bytes: Planned working memory.
        notes: What the caller should know.
    """

    settings: ExtractSettings
    layers: tuple[LayerReport, ...]
    unchanged: tuple[str, ...]
    unexplained: tuple[TensorDifference, ...]
    adapters: dict[str, Adapter] = field(repr=False)
    output: Path | None
    peak_bytes: int
    notes: tuple[str, ...]

    @property
    def totals(self) -> dict[str, float]:
        """Shares of ``sum ||D||_F^2`` over all changed layers, and the relative change."""
        energy = sum(layer.change_norm**2 for layer in self.layers)
        base = sum(layer.base_norm**2 for layer in self.layers)

        def share(part: Callable[[LayerReport], float]) -> float:
            return sum(part(layer) * layer.change_norm**2 for layer in self.layers) / energy

        left = share(lambda layer: layer.residual**2)
        return {
            "change": math.sqrt(energy / base) if base else math.inf,
            "rotation_share": share(lambda layer: layer.rotation_share),
            "rotation_by_chance": share(lambda layer: layer.rotation_by_chance),
            "low_rank_share": share(lambda layer: layer.low_rank_share),
            "explained": 1 - left,
            "residual": math.sqrt(left),
        }


def extract(
    model: CheckpointSource,
    base: CheckpointSource,
    *,
    kind: ExtractKind = "oft+lora",
    rank: int | None = 16,
    energy: float | None = None,
    block_size: int = 32,
    targets: str | Sequence[str] | None = None,
    anchor: float = 1e-3,
    output: str | Path | None = None,
    overwrite: bool = False,
    memory_budget_bytes: int | None = None,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> ExtractResult:
    """Turn a full fine-tune into an OFT adapter, a LoRA adapter, or one of each.

    Per linear weight ``W1 ≈ W0 R + B A``: R block-diagonal, from the identity-anchored Procrustes
    problem; B A the best approximation of rank r of what R leaves.

    Args:
        model: The fine-tune, a full checkpoint.
        base: What it was fine-tuned from.
        kind: ``"oft+lora"``, ``"oft"`` (R only) or ``"lora"`` (R = I).
        rank: Most rank of a module.
        energy: Smallest rank that keeps this share of what LoRA is to explain.
        block_size: OFT block size; a layer gets the nearest divisor of its columns, as in PEFT.
        targets: Patterns of tensor or module names; None for every linear weight.
        anchor: How firmly the rotation stays near the identity, relative to the weight.
        output: Folder to make: the adapter itself, or ``oft`` and ``lora`` inside it.
        overwrite: Whether an existing output may be replaced.
        memory_budget_bytes: Refuse to need more.
        device: Where the linear algebra runs.
        advance: Progress, in input bytes.

    Raises:
        OrthoMergeError: The inputs, settings or output do not fit; all problems at once.
        AdapterError: No linear weight differs.
        NumericalError: A weight is not finite.
        BudgetError: There is no such device.
    """
    require_device(device)
    names = (targets,) if isinstance(targets, str) else tuple(targets or ())
    settings = ExtractSettings(kind, rank, energy, block_size, names, anchor)
    sources = open_source(model), open_source(base)
    plan = plan_extraction(*sources, settings, memory_budget_bytes=memory_budget_bytes)
    destination = None if output is None else Path(output)
    if destination is not None:
        inputs = [path for source in sources for path in source_files(source)]
        check_destination(destination, inputs, single_file=False, overwrite=overwrite)
    result = _explained(plan, sources, settings, destination, torch.device(device), advance)
    if destination is not None:
        publish_bundle(_bundle(result, sources), destination, overwrite=overwrite)
    return result


def _explained(
    plan: ExtractionPlan,
    sources: tuple[Source, Source],
    settings: ExtractSettings,
    destination: Path | None,
    device: torch.device,
    advance: Callable[[int], None] | None,
) -> ExtractResult:
    """Read everything once and return the result, with nothing written yet."""
    factors, reports, unchanged = _walk(plan, *sources, settings, device, advance)
    if not reports:
        raise AdapterError(
            "no linear weight differs from the base, so there is nothing to extract",
            file=sources[0].origin,
        )
    rest = [_compared(sources, name, advance) for name in plan.others]
    adapters, notes = _adapters(factors, settings, sources[1], plan)
    for source in sources:
        source.checkpoint.check_unchanged()
        source.checkpoint.close()
    return ExtractResult(
        settings=settings,
        layers=tuple(sorted(reports, key=lambda report: report.explained)),
        unchanged=tuple(unchanged),
        unexplained=tuple(one for one in rest if one.status != "equal"),
        adapters=adapters,
        output=destination,
        peak_bytes=plan.peak_bytes,
        notes=(*plan.notes, *notes),
    )


def _walk(
    plan: ExtractionPlan,
    model: Source,
    base: Source,
    settings: ExtractSettings,
    device: torch.device,
    advance: Callable[[int], None] | None,
) -> tuple[dict[Layer, LayerFactors], list[LayerReport], list[str]]:
    factors: dict[Layer, LayerFactors] = {}
    reports: list[LayerReport] = []
    unchanged: list[str] = []
    for layer in plan.layers:
        W0, W1 = base.checkpoint.read(layer.name), model.checkpoint.read(layer.name)
        if advance is not None:
            advance(W0.nbytes + W1.nbytes)
        dtype = working_dtype(W0, W1)
        W0 = _lifted(base, layer, W0, dtype, device)
        W1 = _lifted(model, layer, W1, dtype, device)
        if torch.equal(W0, W1):
            unchanged.append(layer.name)
            continue
        found, report = explain(layer, W0, W1, settings)
        factors[layer] = LayerFactors(
            *(part if part is None else part.cpu() for part in (found.generator, found.B, found.A))
        )
        reports.append(report)
    return factors, reports, unchanged


def _lifted(
    source: Source, layer: Layer, stored: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    lifted = stored.to(device=device, dtype=dtype)
    if not bool(torch.isfinite(lifted).all()):
        raise NumericalError(
            "the input holds NaN or infinity",
            file=source.origin,
            tensor=layer.name,
            remedy="Repair or replace this checkpoint, or leave the tensor out with --target.",
        )
    return lifted.mT.contiguous() if layer.transposed else lifted


def _compared(
    sources: tuple[Source, Source], name: str, advance: Callable[[int], None] | None
) -> TensorDifference:
    model, base = sources
    if advance is not None:
        infos = (source.checkpoint.tensors.get(name) for source in sources)
        advance(sum(info.nbytes for info in infos if info is not None))
    return compare_tensor(base.checkpoint, model.checkpoint, name)


def _adapters(
    factors: dict[Layer, LayerFactors],
    settings: ExtractSettings,
    base: Source,
    plan: ExtractionPlan,
) -> tuple[dict[str, Adapter], list[str]]:
    """Build the adapters and say which of those asked for was not needed."""
    config = read_config(base.checkpoint.folder) or {}
    architectures = config.get("architectures") or [""]
    task = "CAUSAL_LM" if str(architectures[0]).endswith("ForCausalLM") else None
    name = _base_name(base)
    found: dict[str, Adapter | None] = {}
    if settings.rotates:
        found["oft"] = oft_adapter(factors, name, task, plan.modules)
    if settings.low_rank:
        # Beside a rotation it belongs on the rotated base, which has no name.
        own = None if settings.rotates else name
        found["lora"] = lora_adapter(factors, own, task, plan.modules)
    missing = [kind for kind, adapter in found.items() if adapter is None]
    notes = [f"no {kind} adapter: nothing above rounding was left for it" for kind in missing]
    return {kind: one for kind, one in found.items() if one is not None}, notes


def _base_name(base: Source) -> str | None:
    """Return what PEFT should call the base; None for tensors in memory."""
    if base.origin.startswith("hf:"):
        return base.origin.removeprefix("hf:").partition("@")[0]
    return None if base.checkpoint.folder is None else base.origin


def _bundle(result: ExtractResult, sources: tuple[Source, Source]) -> Bundle:
    record = {PROVENANCE_NAME: provenance_json(_record(result, sources)) + "\n"}
    if result.settings.kind == "oft+lora":
        folders = {kind: adapter_bundle(one) for kind, one in result.adapters.items()}
        return Bundle(files=record, folders=folders)
    (adapter,) = result.adapters.values()
    return adapter_bundle(adapter, record)


def _record(result: ExtractResult, sources: tuple[Source, Source]) -> dict[str, Any]:
    roles = zip(("model", "base"), sources, strict=True)
    return {
        "orthomerge": __version__,
        "command": "extract",
        "settings": dataclasses.asdict(result.settings),
        "sources": [{"role": role, "origin": source.origin} for role, source in roles],
        "totals": result.totals,
        "layers": [dataclasses.asdict(layer) for layer in result.layers],
        "unchanged": result.unchanged,
        "unexplained": [one.name for one in result.unexplained],
    }
