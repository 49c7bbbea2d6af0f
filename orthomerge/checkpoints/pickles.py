"""Open pickled state dicts without running their code; nothing is ever written as a pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.checkpoints.state_dict import StateDictCheckpoint
from orthomerge.errors import CheckpointError, ShardIndexError

if TYPE_CHECKING:
    import torch

__all__ = ["open_pickles"]


def open_pickles(origin: str, paths: Sequence[Path], folder: Path) -> StateDictCheckpoint:
    """Open one or more pickle files as one set of tensors, with ``weights_only``.

    Raises:
        CheckpointError: A file is damaged, or holds anything but a state dict.
        ShardIndexError: The same tensor is in two files.
    """
    found: dict[str, torch.Tensor] = {}
    where: dict[str, Path] = {}
    for path in paths:
        loaded = _load_pickle(path)
        for wrapper in ("state_dict", "model"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
                loaded = loaded[wrapper]
        if not isinstance(loaded, Mapping):
            raise CheckpointError("holds no state dict", file=path, found=type(loaded).__name__)
        for name, tensor in loaded.items():
            if name in found:
                raise ShardIndexError(
                    f"is in two shards, {where[name].name} and {path.name}",
                    file=origin,
                    tensor=str(name),
                )
            found[name], where[name] = tensor, path
    return StateDictCheckpoint(found, origin, folder, tuple(paths))


def _load_pickle(path: Path) -> Any:
    """Unpickle tensors and containers only; map them from the file where its format allows."""
    import torch

    try:
        mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error
    except Exception as error:  # garbage makes the unpickler raise what it likes
        raise CheckpointError(
            "the pickle file is damaged or holds more than tensors, and is not loaded",
            file=path,
            remedy="Convert it to safetensors on a machine where running its code is safe.",
        ) from error
