"""Write the adapter that undoes another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orthomerge.adapters.negation import negated
from orthomerge.adapters.sources import open_source, source_files
from orthomerge.checkpoints.bundle import publish_bundle
from orthomerge.checkpoints.destination import check_destination
from orthomerge.checkpoints.provenance import PROVENANCE_NAME, provenance_json
from orthomerge.errors import AdapterError
from orthomerge.extraction.folders import adapter_bundle
from orthomerge.version import __version__

__all__ = ["NegateResult", "negate"]


@dataclass(frozen=True, slots=True)
class NegateResult:
    """What was written.

    Attributes:
        output: The folder.
        kind: What the adapter is, in words.
        tensors: Number of its tensors.
        strength: How much of the adapter it undoes.
    """

    output: Path
    kind: str
    tensors: int
    strength: float


def negate(
    adapter: str | Path,
    output: str | Path,
    *,
    strength: float = 1.0,
    overwrite: bool = False,
) -> NegateResult:
    """Write the adapter that undoes a given one, for PEFT to load.

    OFT: ``R -> R^{-1}``; LoRA: ``B A -> -B A``.

    Args:
        adapter: The adapter's folder.
        output: Folder to make.
        strength: How much to undo.
        overwrite: Whether an existing output may be replaced.

    Raises:
        AdapterError: It is no adapter, or its inverse is no adapter of its kind.
        OutputError: The output may not be written there.
    """
    source = open_source(adapter)
    destination = Path(output)
    if source.kind == "full":
        raise AdapterError(
            "only adapters can be negated, and this is a full checkpoint",
            file=source.origin,
            remedy="Make it an adapter first: orthomerge extract MODEL --base BASE -o OUT.",
        )
    check_destination(destination, source_files(source), single_file=False, overwrite=overwrite)
    tensors, config = negated(source, strength=strength)
    source.checkpoint.check_unchanged()
    record = {
        "orthomerge": __version__,
        "command": "negate",
        "strength": strength,
        "sources": [{"role": "adapter", "origin": source.origin}],
    }
    files = {PROVENANCE_NAME: provenance_json(record) + "\n"}
    publish_bundle(adapter_bundle((tensors, config), files), destination, overwrite=overwrite)
    return NegateResult(destination, source.description, len(tensors), strength)
