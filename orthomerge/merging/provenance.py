"""Gather what the provenance of a merge says, from its request, plan and digests."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from orthomerge.checkpoints.digest import DIGEST_PLACEHOLDER, content_digest
from orthomerge.checkpoints.provenance import PROVENANCE_NAME, model_card, provenance_json
from orthomerge.merging.plan import MergeRequest, Plan
from orthomerge.merging.registry import get_method
from orthomerge.version import __version__

__all__ = ["final_metadata", "provenance_files", "single_file_metadata", "source_digests"]


def source_digests(plan: Plan, details: Mapping[str, Any]) -> list[str | None]:
    """Return the content digest of each source, base first, over the tensors that were read.

    None for a source that the method did not look at.
    """
    sources = [*([plan.base] if plan.base else []), *plan.models]
    found: list[dict[str, str]] = [{} for _ in sources]
    for task in plan.tasks:
        for digests, pairs in zip(found, details[task.name]["digests"], strict=False):
            digests.update(dict(pairs))
    return [
        content_digest(source.checkpoint.tensors.values(), digests) if digests else None
        for source, digests in zip(sources, found, strict=True)
    ]


def single_file_metadata(request: MergeRequest, method: str, sources: int) -> dict[str, str]:
    """Return the header metadata of a single-file output, with placeholders for the digests.

    The header is written before the inputs are read, so it has to be as long as the final one.
    """
    return _metadata(request, method, [DIGEST_PLACEHOLDER] * sources)


def final_metadata(plan: Plan, digests: Sequence[str | None]) -> dict[str, str]:
    """Return the header metadata of a single-file output with the digests."""
    # What the layout holds beside the provenance is the format's own, e.g. diffusers' ranks.
    planned = plan.layout.shards[0].metadata
    return {**planned, **_metadata(plan.request, plan.method.name, digests)}


def provenance_files(plan: Plan, digests: Sequence[str | None]) -> dict[str, str]:
    """Return the provenance files of an output folder: name to text."""
    request = plan.request
    content = _content(request, plan.method.name, digests)
    card = model_card(
        request.output.name if request.output else "merged",
        plan.method.name,
        plan.method.reference,
        _sources(request, digests),
        {**request.recipe, "method": plan.method.name},
        adapter="adapter_config.json" in plan.written_files,
    )
    return {PROVENANCE_NAME: provenance_json(content) + "\n", "README.md": card}


def _metadata(request: MergeRequest, method: str, digests: Sequence[str | None]) -> dict[str, str]:
    metadata = {"format": "pt"}
    if request.provenance:
        metadata["orthomerge"] = provenance_json(_content(request, method, digests), indent=None)
    return metadata


def _content(request: MergeRequest, method: str, digests: Sequence[str | None]) -> dict[str, Any]:
    return {
        "orthomerge": __version__,
        "recipe": {**request.recipe, "method": method},
        "method": method,
        "parameters": _resolved_parameters(request, method),
        **({"norm_matched": request.norm_matched} if request.norm_matched is not None else {}),
        "sources": _sources(request, digests),
        "seed": request.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "safetensors")},
        },
        "device": request.device,
    }


def _resolved_parameters(request: MergeRequest, method: str) -> dict[str, Any]:
    """Return every parameter of the method, defaults and the method's own decisions filled in."""
    entry = get_method(method)
    given = {name: request.parameters.get(name, p.default) for name, p in entry.parameters.items()}
    return dict(entry.resolved(given, len(request.models))) if entry.resolved else given


def _sources(request: MergeRequest, digests: Sequence[str | None]) -> list[dict[str, Any]]:
    roles: list[tuple[str, Any]] = [("base", request.base)] if request.base is not None else []
    roles += [("model", model) for model in request.models]
    return [
        {"role": role, "origin": _origin(source), "digest": digest}
        for (role, source), digest in zip(roles, digests, strict=True)
    ]


def _origin(source: Any) -> str:
    return "state dict" if isinstance(source, Mapping) else str(source)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
