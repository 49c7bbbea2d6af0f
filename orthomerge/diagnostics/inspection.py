"""Say what a file or folder is: kind, tensors, dtypes, sizes, provenance. Headers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orthomerge.adapters.sources import Source, open_source
from orthomerge.checkpoints.digest import hash_checkpoint
from orthomerge.checkpoints.folder import read_config
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.provenance import PROVENANCE_NAME, read_provenance
from orthomerge.checkpoints.reader import Checkpoint
from orthomerge.checkpoints.sources import CheckpointSource

__all__ = ["Inspection", "inspect_source"]


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Args:
        origin: What was looked at.
        kind: In words, e.g. ``full checkpoint`` or ``OFT adapter``.
        files: Tensor files, by name.
        tensors: All tensors.
        dtypes: dtype to (number of tensors, bytes).
        architecture: From config.json, if there is one.
        details: What the adapter says of itself, if it is one.
        provenance: How it was made, if orthomerge made it.
        digest: Content digest, if asked for.
    """

    origin: str
    kind: str
    files: tuple[str, ...]
    tensors: tuple[TensorInfo, ...]
    dtypes: dict[str, tuple[int, int]]
    architecture: str | None
    details: dict[str, Any]
    provenance: dict[str, Any] | None
    digest: str | None

    @property
    def parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(info.numel for info in self.tensors)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.tensors)


def inspect_source(source: CheckpointSource, *, digest: bool = False) -> Inspection:
    """Look at a checkpoint or adapter.

    Args:
        source: File, folder, hub name or state dict.
        digest: Also read all tensors once and hash them.

    Raises:
        CheckpointError: It cannot be opened.
        AdapterError: It is a malformed adapter.
    """
    opened = open_source(source)
    checkpoint = opened.checkpoint
    dtypes: dict[str, tuple[int, int]] = {}
    for info in checkpoint.tensors.values():
        count, nbytes = dtypes.get(info.dtype, (0, 0))
        dtypes[info.dtype] = (count + 1, nbytes + info.nbytes)
    in_folder = len(checkpoint.files) != 1 or not str(source).endswith(".safetensors")
    config = read_config(checkpoint.folder) if in_folder else None
    architectures = (config or {}).get("architectures") or []
    return Inspection(
        origin=opened.origin,
        kind=opened.description,
        files=tuple(path.name for path in checkpoint.files),
        tensors=tuple(checkpoint.tensors.values()),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
        architecture=architectures[0] if architectures else None,
        details=_details(opened),
        provenance=_provenance(checkpoint, in_folder),
        digest=hash_checkpoint(checkpoint) if digest else None,
    )


def _details(source: Source) -> dict[str, Any]:
    """Return what an adapter is made of; nothing for other sources."""
    adapter = source.lora or source.rotations
    if adapter is None:
        return {}
    details: dict[str, Any] = {"modules": len(adapter.modules)}
    if source.lora is not None:
        modules = source.lora.modules.values()
        details["ranks"] = sorted({module.rank for module in modules})
        details["scales"] = sorted({round(module.scale, 6) for module in modules})
    if source.rotations is not None:
        rotated = source.rotations.modules.values()
        details["block_sizes"] = sorted({module.block_size for module in rotated})
    if source.oft is not None:
        details["use_cayley_neumann"] = source.oft.convention.cayley_neumann
    return {
        **details,
        "whole_tensors": len(adapter.others),
        "base_model": adapter.config.values.get("base_model_name_or_path"),
    }


def _provenance(checkpoint: Checkpoint, in_folder: bool) -> dict[str, Any] | None:
    if "orthomerge" in checkpoint.metadata:
        return read_provenance(checkpoint.metadata["orthomerge"])
    path = checkpoint.folder / PROVENANCE_NAME if checkpoint.folder else None
    if path is not None and in_folder and path.is_file():
        return read_provenance(path.read_text("utf-8", "replace"))
    return None
