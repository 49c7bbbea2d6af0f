"""Write finished tensors that are small enough to be held, as one folder, whole or not at all.

Tensors that are made one after another go through ``writer`` instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orthomerge.checkpoints.dtypes import safetensors_dtype
from orthomerge.checkpoints.header import TensorInfo, encode_header
from orthomerge.checkpoints.journal import fsync_folder, fsync_write
from orthomerge.checkpoints.staging import Staging
from orthomerge.errors import BudgetError

if TYPE_CHECKING:
    import torch

__all__ = ["Bundle", "publish_bundle"]


@dataclass(frozen=True)
class Bundle:
    """The content of a folder.

    Attributes:
        tensors: Tensors of its one tensor file; none makes no file.
        filename: Name of that file.
        files: Small files by name.
        folders: Folders inside.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    filename: str = "model.safetensors"
    files: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, Bundle] = field(default_factory=dict)


def publish_bundle(bundle: Bundle, output: Path, *, overwrite: bool = False) -> None:
    """Write a bundle beside its place, make it durable, and move it there with one rename.

    Args:
        bundle: The content.
        output: The folder to make.
        overwrite: Whether an existing output may be replaced.

    Raises:
        OutputError: The output exists, or cannot be made.
        BudgetError: The disk is full. Nothing of the output stays.
    """
    staging = Staging(output, "bundle", [], overwrite=overwrite)
    try:
        _write(bundle, staging.files)
        staging.publish(_names(bundle))
    except BaseException as error:
        staging.discard()
        if isinstance(error, OSError):
            raise BudgetError(
                f"cannot be written: {error.strerror}",
                file=output,
                remedy="Free some space, or choose another output path, and run again.",
            ) from error
        raise
    finally:
        staging.close()


def _names(bundle: Bundle) -> set[str]:
    own = {bundle.filename} if bundle.tensors else set()
    return own | set(bundle.files) | set(bundle.folders)


def _write(bundle: Bundle, folder: Path) -> None:
    for name, inner in bundle.folders.items():
        (folder / name).mkdir()
        _write(inner, folder / name)
    if bundle.tensors:
        _write_tensors(bundle.tensors, folder / bundle.filename)
    for name, text in bundle.files.items():
        fsync_write(folder / name, text.encode())
    fsync_folder(folder)


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, widest items first so that each tensor is aligned."""
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    infos = [TensorInfo(n, safetensors_dtype(t.dtype), tuple(t.shape)) for n, t in ordered]
    with path.open("wb") as file:
        file.write(encode_header(infos, {"format": "pt"}))
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
